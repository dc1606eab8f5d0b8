"""What only a browser knows of a page: where things end up."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

from tests import PATIENCE_S

CHROMIUM = shutil.which("chromium")
# Written into a copy of the page; it reports what is wrong in the title, which --dump-dom prints.
PROBE = """<script>addEventListener('load', () => {
  const faults = [];
  const beside = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1;
  const apart = (a, b) => beside(a, b) || a.bottom <= b.top + SLACK || b.bottom <= a.top + SLACK;
  document.querySelectorAll('svg.chart').forEach((svg, n) => {
    const frame = svg.getBoundingClientRect();
    const least = svg.classList.contains('small') ? [150, 100] : [300, 150];
    if (frame.width < least[0] || frame.height < least[1]) faults.push(`chart ${n} is too small`);
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([text, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
          || box.bottom > frame.bottom + 1) faults.push(`chart ${n}: ${text} is clipped`);
      texts.slice(i + 1).forEach(([other, place]) => {
        if (!apart(box, place)) faults.push(`chart ${n}: ${text} overlaps ${other}`);
      });
    });
  });
  if (document.documentElement.scrollWidth > innerWidth) faults.push('the page is wider than the window');
  const count = selector => document.querySelectorAll(selector).length;
  document.title = JSON.stringify({charts: count('svg.chart'), traces: count('.trace'), faults});
})</script>"""


def look(html: str, folder: Path, window: str, slack: int = 2) -> dict[str, Any]:
    """Opens a page in chromium.

    Args:
        html: The page.
        folder: Where files may be written.
        window: Width and height, ``"1200,900"``.
        slack: Pixels by which lines of text may overlap, of the space that fonts leave above and below.

    Returns:
        Numbers of ``charts`` and ``traces``, and ``faults``: what overlaps, is clipped or too wide.
    """
    file = folder / "page.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    file.write_text(text.replace("</body>", PROBE.replace("SLACK", str(slack)) + "</body>"), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={window}", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    found: dict[str, Any] = json.loads(unescape(title[1]))
    return found
