"""How training goes: a bar on a terminal, a rare line off one; on stderr, from rank 0."""

import sys
import time

from harness.progress import SECONDS_BETWEEN_LINES

from harness import distributed

BAR = "{desc} {percentage:3.0f}% {bar} {elapsed}<{remaining} {postfix}"


class Meter:
    """Loss, learning rate and tokens per second beside the share of the run that is done."""

    def __init__(self, done: float, tokens: int):
        self.start = self.last = time.perf_counter()
        self.first_tokens = tokens
        self.silent = distributed.rank() > 0
        self.bar = None
        if not self.silent and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(desc="recover", total=1.0, initial=done, bar_format=BAR, leave=False)

    def show(self, done: float, step: int, loss: float, rate: float, tokens: int) -> None:
        now = time.perf_counter()
        if self.silent or (self.bar is None and now - self.last < SECONDS_BETWEEN_LINES):
            return
        speed = (tokens - self.first_tokens) / (now - self.start)
        text = f"step {step}, loss {loss:.4f}, lr {rate:.2e}, {speed:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        self.last = now
        print(f"recover: {done:.0%}, {text}", file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
