"""A float model served as if quantized, with ModelOpt's variables: python examples/serve_fakequant.py MODEL -tp 2"""

from fewbit.serve_fakequant import main

if __name__ == "__main__":
    main()
