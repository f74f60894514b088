"""The words of a report, each in one plain sentence."""

from __future__ import annotations

from html import escape

from markupsafe import Markup

WORDS: dict[str, str] = {
    "accuracy": "Share of held-out test rows that the model answers rightly.",
    "achieved ratio": "Share of the covered weights that the last mask isolated.",
    "anchor": "A pull of every weight back towards where it began; the stronger, the less it moves.",
    "audit": "A comparison of checkpoints, bit by bit, that shows whether any isolated weight moved.",
    "covered": "Weights that may be isolated: those that are trained, and are not excluded.",
    "displacement": "How far a layer's weights went from where they began, over their length there.",
    "drift": "How much the set of isolated weights changes from one mask to the next.",
    "flip rate": "Share of the weights isolated before that this refresh let move again.",
    "forgetting": "The best earlier score minus the last one: positive is forgotten. Of losses, how far they rose.",
    "importance": "Moving average of the squared gradient of a weight: how much the loss depends on it.",
    "isolated": "Held still, to the bit, until the next refresh.",
    "isolated share": "How many of the covered weights are isolated.",
    "kept": "Tasks that the model could do before, and that no stage of this run trains.",
    "kind": "The same matrix of all layers: all query projections, all norms.",
    "layer": "A block of the model, or its embeddings, its head or its last norm.",
    "learnt": "Tasks that a stage of this run trains.",
    "loss": "How surprised the model is by the right next token, on average; lower is better.",
    "mask": "Says of every weight whether it is isolated.",
    "memory of isolation": "Bytes that importance, masks and what an anchor pulls towards take on one rank.",
    "overlap": "Of the weights isolated by either of two masks, the share isolated by both (Jaccard index).",
    "own rows": "Examples that the model wrote itself before training, to be kept.",
    "peak memory": "The most memory that the first rank's process had in use.",
    "rank": "One process of the run; usually one per GPU.",
    "ratio": "Share of the covered weights that may be isolated.",
    "refresh": "The choice of a new mask, by the importance of now.",
    "resume": "A start from a checkpoint of the same run, after it was stopped.",
    "setting": "A key of the recipe; bold where its value was given, and is not the default.",
    "source": "One set of training rows; replayed where it is drawn from what is to be kept.",
    "stage": "A stretch of the run with training data of its own.",
    "standard error": "By how much an accuracy would typically differ on other test rows of this number.",
    "step": "One update of the weights.",
    "threshold": "Importance from which on weights of a layer are isolated.",
}


def term(name: str, shown: str | None = None) -> Markup:
    """Return a word, or how it is shown, with its explanation. Raises KeyError for one that has none."""
    text = escape(WORDS[name])
    # Reached by the keyboard and by a finger, too.
    return Markup(f'<abbr class="term" tabindex="0" title="{text}">{escape(shown or name)}</abbr>')
