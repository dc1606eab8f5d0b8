"""What the recipes share: the config groups and launch.sh of the GPU recipes, the warm start of the CPU recipes."""
