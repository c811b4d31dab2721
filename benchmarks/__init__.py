"""Measurements beside what a user would pick instead: Trainer with PEFT, gradience, dense SVDs. `make bench`."""
