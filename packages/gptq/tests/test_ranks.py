"""Two gloo processes give what one gives, bit for bit."""

from pathlib import Path

import driving
import families


def test_two_ranks_equal_one(tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    # Sizes that divide neither by the ranks nor by the width of a vector register.
    families.save("llama", model, tokenizer=True, num_hidden_layers=2, intermediate_size=80)
    text.write_text(families.TEXT * 200)
    driver = Path(__file__).with_name("ranks_driver.py")
    made = driving.two_ranks_equal_one(tmp_path, driver, model, text)
    assert made == {"ordered", "plain", "dynamic", "single", "nearest", "cli"}
