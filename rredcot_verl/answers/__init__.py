"""The grammar of answers: what of a response is its final answer, and when two answers are the same text.

- `thinking.py`: where what counts begins, after a thinking block.
- `boxed.py`: boxes, nested and in a row.
- `program.py`: programs in fenced blocks.
- `separators.py`: commas within numbers, and commas between them.
- `grammar.py`: the formats (`\\boxed{}`, `####`, `Answer:`, a fenced program, one's own), where an answer starts and
  ends in each, which of several is final (`find_answer`), its canonical form, and the reference answers that a data
  row names.

Probes, verifiers and data preparation ask here and nowhere else, so that all mean the same characters of a response.
Whether an answer is *right* is the verifier's to say.
"""
