import sys
from pathlib import Path

# families.py and kill_driver.py, the helper modules of the harness's tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "harness" / "tests"))
