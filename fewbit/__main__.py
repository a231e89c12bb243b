"""python -m fewbit"""

from fewbit.cli import main

main()
