"""Requests and answers as pydantic models: what is checked, and what the page of the API shows."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from comoe.tasks.labels import whole_characters

EXAMPLE = "what a lovely day :)"


class Strict(BaseModel):
    """Refuses unknown keys, and turns no number into text."""

    model_config = ConfigDict(extra="forbid", strict=True)


Name = Annotated[str, Field(max_length=200)]


def _decoded(given: Any) -> Any:
    try:
        return base64.b64decode(given, validate=True) if isinstance(given, str) else given
    except ValueError:
        raise ValueError("must be a file in base64") from None


Image = Annotated[
    bytes,
    BeforeValidator(_decoded),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]


Texts = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[str], Tag("list")],
    Discriminator(lambda given: "list" if isinstance(given, list) else "string"),
]
"""A text, or several."""


class Post(Strict):
    """A post with more than its text."""

    text: Texts | None = Field(
        None,
        description="The post; may be left out where there are words. For tasks of authors a list: the posts of one.",
    )
    pair: Texts | None = Field(
        None,
        description="Second text: stance target, aspect; of a context the parent, or a list, the thread down to it.",
    )
    words: list[str] | None = Field(None, description="The post as words, for tags.")
    image: Image | None = Field(
        None, description="An image file in base64, for models with images."
    )

    @model_validator(mode="after")
    def _has_text(self) -> Post:
        if self.text is None and self.words is None:
            raise ValueError("a post needs text or words")
        return self

    def characters(self) -> int:
        """Length of all its texts, with a blank behind each word."""
        words = self.words or ()
        return sum(map(len, texts_in(self.text, self.pair, words))) + len(words)

    def columns(self) -> dict[str, Any]:
        """Text, second text, words, image, as the predictor reads them; half a character is none."""
        text, pair = (
            [*map(whole_characters, value)] if isinstance(value, list) else value and whole_characters(value)
            for value in (self.text, self.pair)
        )  # fmt: skip
        words = self.words and [whole_characters(word) for word in self.words]
        return {"text": text, "pair": pair, "words": words, "image": self.image}


def texts_in(*fields: str | Sequence[str] | None) -> list[str]:
    """All texts in some fields of a post, those of lists one by one."""
    return [
        text for field in fields for text in ((field,) if isinstance(field, str) else field or ())
    ]


AnyPost = Annotated[
    Annotated[str, Tag("string")] | Annotated[Post, Tag("object")],
    Discriminator(lambda given: "string" if isinstance(given, str) else "object"),
]


class Ask(Strict):
    """Posts, and who reads them."""

    posts: list[AnyPost] = Field(
        min_length=1, description="Strings, or objects with more than a text.", examples=[[EXAMPLE]]
    )
    model: Name | None = Field(None, description="Name of a served model; the first by default.")
    revision: Name | None = Field(None, description="Its revision; the last by default.")

    def as_objects(self) -> list[Post]:
        """Each post as an object."""
        return [Post(text=post) if isinstance(post, str) else post for post in self.posts]


class Question(Ask):
    """Posts to predict."""

    tasks: list[Name] | None = Field(
        None, min_length=1, max_length=1000, description="Names of tasks; all by default."
    )


class ExplainQuestion(Question):
    """Posts to predict, with what explains the predictions."""

    method: Literal["attention", "gradients", "experts"] = Field(
        "attention",
        description="attention: share of each word in that of a task's head, no proof of a cause; gradients: signed "
        "integrated gradients of the predicted label, slow; experts: those that each word used.",
    )


class EmbedQuestion(Ask):
    """Posts to embed."""

    task: Name | None = Field(
        None,
        description="Reads the posts; counts where the model routes by task. The first by default.",
    )


class Answer(BaseModel):
    """One object per post, in their order."""

    model: str
    revision: str
    predictions: list[dict[str, Any]] = Field(
        description="Per post what `comoe predict` writes, without its text: an object per task, "
        "or `error`; `truncated`, `image_error`; `embedding`.",
        examples=[[{"mood": {"label": "positive", "scores": {"negative": 0.1, "positive": 0.9}}}]],
    )


class ServedTask(BaseModel):
    """A task of a model."""

    name: str
    kind: str
    labels: list[str]
    explained: bool = Field(description="Whether /v1/explain weighs the words for it.")


class ServedModel(BaseModel):
    """A revision of a model."""

    model: str
    revision: str
    reads_images: bool
    max_tokens: int = Field(description="Longer posts are cut.")
    tasks: list[ServedTask]


class Listing(BaseModel):
    """All that is served."""

    models: list[ServedModel]


class Fault(BaseModel):
    """What is wrong."""

    code: str = Field(description="A word for programs.")
    message: str = Field(description="A sentence for people. It repeats nothing of a post.")


class Refusal(BaseModel):
    """The answer to every request that is not fulfilled."""

    error: Fault
