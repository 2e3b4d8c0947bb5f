"""Pictures that prompts ask about: opened, checked and turned into what an image-text model reads.

Everything goes through the model's own processor, on images of Pillow. A picture that is not what it says is refused by
name before any of it is decoded: what the model is shown must be what the study says it was shown.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lesion.batteries import picture

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 40_000_000  # beyond, a small file may unfold into more memory than there is
FORMATS = ("PNG", "JPEG")


def load_picture(name: str) -> Image:
    """A packaged picture or a file, whole and as RGB.

    Raises ValueError for a file that is missing, empty, no PNG or JPEG, cut off, of more than MOST_PIXELS pixels, or in
    another mode than RGB: how transparency or a palette becomes colours is the user's to decide.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    data = picture(name)
    if not data:
        raise ValueError(f"picture {name!r} is an empty file")
    try:
        image = pillow.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"picture {name!r} is no PNG or JPEG that can be read") from None
    except pillow.DecompressionBombError as error:
        raise ValueError(f"picture {name!r} is too large: {error}") from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"picture {name!r} is too large: {width} × {height} pixels, at most {MOST_PIXELS:,} are read")
    if image.mode != "RGB":
        raise ValueError(f"picture {name!r} is in mode {image.mode}, expected RGB: convert it first")
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"picture {name!r} is damaged or cut off: {error}") from None
    return image


def look(processor: Any, prompt: str, name: str, chat: bool) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Token ids of a prompt that begins with a picture; for each token the number of the picture it stands for (0: text);
    and the tensors that show the picture to the model.

    chat: with the processor's chat template, else the picture's mark stands before the prompt.
    """
    if chat:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = f"{getattr(processor, 'boi_token', None) or processor.image_token}{prompt}"
    # a chat template brings its own start token; a second one would be a prompt that no model was trained on
    found = processor(text=[text], images=[[load_picture(name)]], return_tensors="pt", add_special_tokens=not chat)
    ids = tuple(found.pop("input_ids")[0].tolist())
    found.pop("attention_mask", None)
    kinds = found.pop("token_type_ids", None)
    mark = processor.tokenizer.convert_tokens_to_ids(getattr(processor.tokenizer, "image_token", processor.image_token))
    shows = [t == mark for t in ids] if kinds is None else [k == 1 for k in kinds[0].tolist()]
    if not any(shows):
        raise ValueError(f"the processor put no picture into the prompt {prompt[:60]!r}")
    return ids, _runs(shows), dict(found)


def _runs(shows: Sequence[bool]) -> tuple[int, ...]:
    """Numbers the runs of what is true: 0, 1, 1, 0, 2 for F, T, T, F, T."""
    runs, count, before = [], 0, False
    for here in shows:
        count += here and not before
        runs.append(count if here else 0)
        before = here
    return tuple(runs)
