import sys

from gptq.cli import main

sys.exit(main())
