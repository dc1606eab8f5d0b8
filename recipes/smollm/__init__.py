"""The quickstart's task in English for a pretrained model: SmolLM2-135M, from a package of the registry."""
