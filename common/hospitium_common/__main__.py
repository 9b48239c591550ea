"""`python -m hospitium_common` is `hospitium`, under whichever interpreter runs it."""

from hospitium_common.cli import main

main()
