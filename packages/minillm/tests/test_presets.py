"""Every preset is understood by the real parsers, and says what was published."""

import pytest
import yaml

from minillm import evaluate, finetune, presets, train_minillm

PARSERS = {
    "sft": finetune.parser, "kd": finetune.parser, "seqkd": finetune.parser,
    "minillm": train_minillm.parser, "evaluate": evaluate.parser,
}  # fmt: skip
# learning rate, epochs: SFT and KD
PUBLISHED = {
    "gpt2-base": (5e-4, 20), "gpt2-medium": (1e-4, 20), "gpt2-large": (1e-4, 10),
    "gpt2-xl": (5e-5, 10), "opt-1.3b": (5e-5, 10), "opt-2.7b": (5e-5, 10),
    "opt-6.7b": (1e-5, 10), "opt-13b": (1e-5, 10), "llama-7b": (1e-5, 10),
    "llama-13b": (1e-5, 10), "llama-7b-lora": (5e-4, 20),
}  # fmt: skip
TEACHERS = ("gpt2-xl", "opt-13b", "llama-13b")
BARE = {
    "sft": ["m", "--data", "d"],
    "kd": ["m", "--data", "d", "--type", "kd"],
    "seqkd": ["m", "--data", "d", "--type", "seqkd"],
    "minillm": ["m", "--data", "d", "--teacher", "t"],
    "evaluate": ["m", "--data", "d"],
}
SECTIONS = [(name, section) for name in presets.names() for section in presets.load(name)]


def parser_of(section):
    made = PARSERS[section]()
    if "preset" not in {action.dest for action in made._actions}:
        made.add_argument("--preset")
    return made


def parsed(name, section, *words):
    argv = [*BARE[section], "--preset", name, *words]
    return presets.parse(parser_of(section), argv, section)


@pytest.mark.parametrize("name, section", SECTIONS)
@pytest.mark.parametrize("ranks", ["1", "16"])
def test_a_preset_is_the_same_words_on_the_command_line(name, section, ranks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    found = parsed(name, section)
    assert found.preset == name
    found.preset = None
    bare = parser_of(section).parse_args([*BARE[section], *presets.words(name, section)])
    assert vars(found) == vars(bare)
    assert vars(bare) != vars(parser_of(section).parse_args(BARE[section]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings(name):
    rate, epochs = PUBLISHED[name]
    sections = ["sft"]
    if name not in TEACHERS:
        sections += ["minillm"] if name == "llama-7b-lora" else ["kd", "seqkd", "minillm"]
    assert list(presets.load(name)) == sections
    for section in sections:
        args = parsed(name, section)
        assert (args.max_length, args.max_prompt_length, args.dev_num) == (512, 256, 1000)
        assert (args.clip_grad, args.seed) == (1.0, 10)
        if section != "minillm":
            assert (args.lr, args.epochs, args.lr_min) == (rate, epochs, 1e-7)
            assert (args.lr_decay_style, args.weight_decay) == ("cosine", 1e-2)
            assert args.eval_gen == (section != "sft") and args.kd_ratio == 0.5
            continue
        assert (args.lr, args.epochs, args.total_iters, args.warmup_iters) == (5e-6, 10, 5000, 100)
        assert (args.num_rollouts, args.ppo_epochs, args.cliprange) == (256, 4, 0.2)
        assert (args.teacher_mixed_alpha, args.gamma, args.reward_scaling) == (0.2, 0.95, 0.5)
        assert args.select == "rouge"
        assert args.length_norm and args.single_step_reg and args.lm_coef == 1
        assert (args.lr_decay_style, args.weight_decay) == ("constant", 1e-6)
    if name == "llama-7b-lora":
        assert (args.peft, args.peft_lora_r, args.peft_lora_alpha) == ("lora", 8, 32)
        assert parsed(name, "sft").peft_lora_dropout == 0.1


def test_every_published_model_has_a_preset_and_they_are_small():
    embedded = {"tiny-llama", "tiny-llama-student"}
    assert set(presets.names()) == {*PUBLISHED, *embedded}
    for path in presets.FOLDER.glob("*.yaml"):
        assert len(path.read_text().splitlines()) < 50
        yaml.safe_load(path.read_text())


def test_flags_win_and_the_batch_is_over_all_processes(monkeypatch):
    args = parsed("gpt2-base", "sft", "--lr", "1", "--batch-size", "4")
    assert (args.lr, args.batch_size, args.gradient_accumulation_steps) == (1.0, 4, 8)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert parsed("gpt2-base", "sft").gradient_accumulation_steps == 1
    args = parsed("gpt2-base", "sft", "--gradient-accumulation-steps", "3")
    assert args.gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "gpt2"], "invalid choice: 'gpt2'"),
        (["--preset", "gpt2-xl"], "is of sft, and says nothing of kd"),
    ],
)
def test_what_there_is_not_is_said(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        presets.parse(parser_of("kd"), [*BARE["kd"], *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err
