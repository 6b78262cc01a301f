"""Greedy answers compared with the reference, character by character."""

from collections.abc import Sequence
from typing import Any

from forge_core.data import Conversation, Tokenizer
from forge_core.model import CausalLM

from .mode import evaluating


def evaluate_exact_match(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Answer the last turn of each conversation greedily and compare with its text.

    Both are stripped of white space at the ends; the quasi score also ignores case (`str.casefold`).

    Args:
        model: used in evaluation mode, given back in the mode it came in.
        tokenizer: with a chat template; an answer ends at one of its stop ids.
        conversations: each ends with the assistant's reference answer.
        max_new_tokens: longest answer; a longer one is cut and so rarely equal.
        batch_size: prompts generated together.

    Returns:
        accuracy and quasi_accuracy (0 to 1), correct, quasi_correct, total, and predictions: per conversation a
        dict with file, line, prompt, reference, prediction, correct.

    Raises:
        ValueError: no conversation, or one that does not end with an assistant turn (file:line).
    """
    if not conversations:
        raise ValueError("conversations: got none, expected at least one to answer")
    prompts = [_prompt(conversation, tokenizer) for conversation in conversations]
    with evaluating(model):
        answers = model.generate(
            [tokenizer.encode(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            stop=tokenizer.stop_ids,
            batch_size=batch_size,
        )
    predictions = []
    for conversation, prompt, answer in zip(conversations, prompts, answers, strict=True):
        prediction = tokenizer.decode(answer).strip()
        reference = conversation.messages[-1].content.strip()
        predictions.append(
            {
                "file": conversation.file,
                "line": conversation.line,
                "prompt": prompt,
                "reference": reference,
                "prediction": prediction,
                "correct": prediction == reference,
                "quasi_correct": prediction.casefold() == reference.casefold(),
            }
        )
    correct = sum(bool(item["correct"]) for item in predictions)
    quasi = sum(bool(item["quasi_correct"]) for item in predictions)
    total = len(predictions)
    return {
        "accuracy": correct / total,
        "quasi_accuracy": quasi / total,
        "correct": correct,
        "quasi_correct": quasi,
        "total": total,
        "predictions": predictions,
    }


def _prompt(conversation: Conversation, tokenizer: Tokenizer) -> str:
    messages = conversation.messages
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise ValueError(
            f"{conversation.file}:{conversation.line}: got the roles {[m.role for m in messages]}, expected a "
            "conversation that ends with the assistant's reference answer"
        )
    return tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
