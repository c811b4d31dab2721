"""The commands of `lora-lab`, one file for each group; app/cli.py puts them together."""
