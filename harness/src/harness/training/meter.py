"""How training goes: a bar on a terminal, a rare line off one; on stderr, from rank 0."""

import sys
import time

from harness import distributed
from harness.progress import SECONDS_BETWEEN_LINES, time_left

BAR = "{desc} {n_fmt}/{total_fmt} {bar} {elapsed}<{remaining} {postfix}"


def table(result: dict) -> str:
    """The validation values of every look of `training.loop.train`, in Markdown; the one that is
    written is marked."""
    rows = result["rows"]
    names = [name for name in rows[-1] if name not in ("step", "tokens")]
    lines = [f"| step | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    lines.append(f"| ---: |{' ---: |' * len(names)}")
    for row in rows:
        mark = " *" if row["step"] == result["best_step"] else ""
        values = (f"{row[name]:.4f}" if name in row else "" for name in names)
        lines.append(f"| {row['step']}{mark} | {' | '.join(values)} |")
    seconds = f"{result['seconds']:.0f} s"
    lines.append(f"* written; {result['steps']} steps, {result['tokens']} tokens, {seconds}")
    return "\n".join(lines)


class Meter:
    """Losses, learning rate and tokens per second beside the steps that are done."""

    def __init__(self, label: str, steps: int, done: int, tokens: int):
        self.label, self.steps, self.done, self.first_tokens = label, steps, done, tokens
        self.start = self.last = time.perf_counter()
        self.silent = distributed.rank() > 0
        self.bar = None
        if not self.silent and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(desc=label, total=steps, initial=done, bar_format=BAR, leave=False)

    def show(self, step: int, means: dict[str, float], rate: float, tokens: int) -> None:
        now = time.perf_counter()
        if self.silent or (self.bar is None and now - self.last < SECONDS_BETWEEN_LINES):
            return
        speed = (tokens - self.first_tokens) / (now - self.start)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        text = f"{losses}, lr {rate:.2e}, {speed:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        self.last = now
        left = time_left(now - self.start, step - self.done, self.steps - self.done)
        print(f"{self.label}: step {step}/{self.steps}, {text}, {left}", file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
