"""What the commands of `harness` do: evaluation and its report, pictures, info, conversion."""
