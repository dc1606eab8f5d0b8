"""Where responses are generated and verified: the agent loop worker, and the reward manager."""
