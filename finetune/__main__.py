"""`python -m finetune`."""

from finetune.cli.app import main

main()
