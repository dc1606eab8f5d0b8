"""A reward that a random model earns now and then, so that GRPO has something to learn from."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """Returns the share of letters from the first half of the alphabet."""
    letters = [character for character in solution_str.lower() if character.isalpha()]
    return sum(character <= "m" for character in letters) / max(1, len(letters))
