"""Which columns of a table are read, chosen once per file by what they are called and hold.

| kind | columns |
| --- | --- |
| text | `text`, else (where there is neither of the next two) another of files.TEXT_COLUMNS, else the only one that holds text |
| chat | `messages` (role, content) or `conversations` (from, value): the tokenizer's chat template renders them |
| pair | `prompt`, or `instruction` with `input` or `context`, and a response |

A row in which a chosen column holds something else is an error that names it, never another column.
"""  # noqa: E501

from dataclasses import dataclass
from itertools import islice

from harness.data import files, instructions
from harness.errors import UserError, one_line

CHATS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
HEAD = 100  # rows by which the columns are chosen


@dataclass(frozen=True)
class Columns:
    """Of one file: "text", "chat" or "pair", and the names of the columns, a pair's in the order
    prompt or instruction, response, input or context (or None)."""

    kind: str
    names: tuple


def choose(rows: list[dict], path) -> Columns:
    """Of the file ``path`` by its first rows.

    Raises:
        UserError: nothing in them is text for sure.
    """
    head = list(islice(rows, HEAD))
    keys = dict.fromkeys(key for row in head for key in row)
    if "text" in keys and _any(head, "text", str):
        return Columns("text", ("text",))
    chat = next((name for name in CHATS if _any(head, name, list)), None)
    if chat:
        return Columns("chat", (chat,))
    pair = pair_columns(head)
    if pair:
        return pair
    named = next((name for name in files.TEXT_COLUMNS if _any(head, name, str)), None)
    strings = [key for key in keys if _any(head, key, str)]
    if named or len(strings) == 1:
        return Columns("text", (named or strings[0],))
    raise UserError(
        f"{path}: no text column among {files.columns(head[0] if head else {})}; name one of them "
        f"'{files.TEXT_COLUMNS[0]}'"
    )


def pair_columns(head: list[dict]) -> Columns | None:
    """A prompt's and its response's, where the rows have such."""
    response = next((n for n in instructions.RESPONSES if _any(head, n, str | list)), None)
    if response is None:
        return None
    if _any(head, "prompt", str):
        return Columns("pair", ("prompt", response, None))
    if _any(head, "instruction", str):
        more = next((n for n in ("input", "context") if any(n in row for row in head)), None)
        return Columns("pair", ("instruction", response, more))
    return None


def _any(head: list[dict], name: str, kind) -> bool:
    return any(isinstance(row.get(name), kind) for row in head)


def text_of(row: dict, columns: Columns, tokenizer, where: str) -> str:
    """One row's text; ``where`` names it in errors.

    Raises:
        UserError: a column holds no text, or the tokenizer has no chat template.
    """
    if columns.kind == "pair":
        pair = pair_of(row, columns, tokenizer, where)
        return pair["prompt"] + pair["response"]
    if columns.kind == "chat":
        return _render(tokenizer, _messages(row, columns.names[0], where), where)
    return _string(row, columns.names[0], where)


def pair_of(row: dict, columns: Columns, tokenizer, where: str) -> dict[str, str]:
    """One row as {"prompt", "response"}; of a chat the response is the last turn's, which has to be
    the assistant's."""
    if columns.kind == "chat":
        return _chat_pair(_messages(row, columns.names[0], where), tokenizer, where)
    asked, answer, more = columns.names
    if asked == "prompt" and asked not in row and "instruction" in row:
        # Rows of two kinds: one brings its own prompt, the other is put into the Alpaca format.
        asked, more = "instruction", "input" if "input" in row else "context"
    response = row.get(answer)
    if isinstance(response, list) and response:  # several references
        row = row | {answer: response[0]}
    prompt, response = _string(row, asked, where), _string(row, answer, where)
    if asked == "instruction":
        context = row.get(more) or "" if more else ""
        if not isinstance(context, str):
            raise UserError(f"{where}: {more} is {context!r:.40}; expected text.")
        prompt = instructions.alpaca_prompt(prompt, context)
    return {"prompt": prompt, "response": response}


def _string(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        fault = f"is {value!r:.40}" if name in row else "is missing"
        raise UserError(
            f"{where}: {name} {fault}; expected text, as in the file's other rows. Mend the row or "
            "drop it."
        )
    return value


def _messages(row: dict, name: str, where: str) -> list[dict[str, str]]:
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {name} is {turns!r:.40}; expected a list of messages.")
    messages = []
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):  # parts, of which those with text are read
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(part for part in parts if isinstance(part, str))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{where}: {name} holds {turn!r:.60}; expected role and content (or from and "
                "value), both text."
            )
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def _render(tokenizer, messages: list[dict], where: str, prompt: bool = False) -> str:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: a chat, and the tokenizer has no chat template to render it with; take the "
            "chat model's tokenizer, or write the rendered text into a column 'text'."
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # the template's own code over the row's roles
        raise UserError(
            f"{where}: the chat template does not take these messages: {one_line(error)}"
        ) from error
    # The encoder puts BOS in front by itself, where the tokenizer does.
    bos = tokenizer.bos_token
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if bos and begins else text


def _chat_pair(messages: list[dict], tokenizer, where: str) -> dict[str, str]:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise UserError(
            f"{where}: the last of {len(messages)} messages is by {messages[-1]['role']!r:.40}; "
            "expected an answer of the assistant's at the end."
        )
    prompt = _render(tokenizer, messages[:-1], where, prompt=True)
    whole = _render(tokenizer, messages, where)
    if not whole.startswith(prompt):  # a template that renders the past otherwise
        return {"prompt": prompt, "response": messages[-1]["content"]}
    response = whole[len(prompt) :]
    end = tokenizer.eos_token
    return {"prompt": prompt, "response": response.rstrip().removesuffix(end) if end else response}
