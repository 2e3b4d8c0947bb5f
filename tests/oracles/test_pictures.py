"""Pictures in prompts, against transformers' own processor and `generate`, on tiny random twins."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lesion import packaged
from lesion.decode import Prompt, Sampling, continue_texts
from lesion.measures import Generation
from lesion.pictures import load_picture, look
from lesion.subjects import Directory, Scratch

GEMMA = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]


def tokenizer(special, ids):
    """Bytes, an end token, and the special tokens at these ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<pad>": 256, "<eos>": 257, "<bos>": 258, "<unk>": 259}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([*special])
    assert [made.token_to_id(s) for s in special] == list(ids)
    return made


def loud(model):
    """Weights so large that a picture is heard in the answer; fresh ones hardly are, and some are zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)


def gemma(folder):
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(GEMMA, range(260, 263)), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens={"boi_token": GEMMA[0], "eoi_token": GEMMA[1], "image_token": GEMMA[2]},
    )  # fmt: skip
    config = packaged.TINY["tiny-gemma3"]
    size = config["vision_config"]["image_size"]
    eye = Gemma3ImageProcessorPil(size={"height": size, "width": size})
    model = Scratch(architecture="tiny-gemma3", seed=3).load().model
    loud(model)
    model.save_pretrained(folder)
    Gemma3Processor(eye, words, image_seq_length=config["mm_tokens_per_image"]).save_pretrained(folder)


def smolvlm(folder):
    from transformers import Idefics3Processor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    special = ["<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"]
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(special, range(260, 264)), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    size = packaged.TINY["tiny-smolvlm"]["vision_config"]["image_size"]
    eye = SmolVLMImageProcessorPil(
        size={"longest_edge": size}, max_image_size={"longest_edge": size}, do_image_splitting=False
    )
    model = Scratch(architecture="tiny-smolvlm", seed=3).load().model
    loud(model)
    model.save_pretrained(folder)
    Idefics3Processor(eye, words, image_seq_len=4).save_pretrained(folder)
    # as it is published: a processor that also wants to see films
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(config | {"processor_class": "SmolVLMProcessor"}))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), dtype=np.uint8)
        made.append(folder / f"noise-{number}.png")
        Image.fromarray(pixels).save(made[-1])
    return [str(path) for path in made]


@pytest.fixture(scope="module", params=[gemma, smolvlm], ids=lambda make: make.__name__)
def seeing(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("model")
    request.param(folder)
    return Directory(path=str(folder)).load()


def theirs(specimen, text, name, n):
    """Greedy tokens and logits by transformers alone."""
    processor = specimen.processor
    mark = getattr(processor, "boi_token", None) or "<image>"
    given = processor(text=[f"{mark}{text}"], images=[[load_picture(name)]], return_tensors="pt")
    out = specimen.model.generate(
        **given, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None
    )
    logs = torch.stack(out.logits).log_softmax(-1)[:, 0]
    tokens = out.sequences[0, given["input_ids"].shape[1] :]
    return tokens.tolist(), logs.gather(1, tokens[:, None])[:, 0].tolist()


def ours(specimen, asked, n, batch):
    prompts, tensors = [], {}
    for number, (text, name) in enumerate(asked):
        if name is None:
            prompts.append(Prompt(str(number), tuple(specimen.tokenizer(text)["input_ids"])))
            continue
        ids, shows, made = look(specimen.processor, text, name, chat=False)
        prompts.append(Prompt(str(number), ids, shows, tensors.setdefault(name, made)))
    return continue_texts(
        specimen.model, prompts, Sampling(temperature=0), new_tokens=n, ends=frozenset(), seed=0, batch=batch
    )


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_pictures_give_what_transformers_gives(seeing, pictures, batch):
    one, two = pictures
    mixed = [("What is it?", one), ("And this thing here?", two), ("a plain text", None), ("What?", one), ("Hm", two)]
    shared = [("What is it?", one), ("What is there, in detail?", one), ("Hm", one)]
    for asked in (mixed, shared):
        for (text, name), found in zip(asked, ours(seeing, asked, 8, batch), strict=True):
            if name is not None:
                tokens, logs = theirs(seeing, text, name, 8)
                assert found.logprobs == pytest.approx(logs, abs=2e-4)
                assert found.tokens == tokens


def test_another_picture_is_another_answer(seeing, pictures):
    a, b = ours(seeing, [("What is it?", name) for name in pictures], 6, 2)
    assert a.logprobs != pytest.approx(b.logprobs, abs=1e-3)


def test_the_tokens_of_a_picture_see_each_other_both_ways(seeing, pictures, monkeypatch):
    """Else Gemma would still answer, only not as it was trained to."""
    from lesion import decode

    want = ours(seeing, [("What is it?", pictures[0])], 4, 1)[0].logprobs
    monkeypatch.setattr(decode, "_SEES_BOTH_WAYS", set())
    blinkered = ours(seeing, [("What is it?", pictures[0])], 4, 1)[0].logprobs
    assert (blinkered == pytest.approx(want, abs=1e-3)) == (seeing.model.config.model_type == "smolvlm")


def test_a_battery_with_pictures_is_a_reading_like_any_other(tmp_path, lab, pictures):
    folder = tmp_path / "model"
    gemma(folder)
    battery = tmp_path / "own.jsonl"
    battery.write_text(
        f'{{"prompt": "What is it?", "image": "{pictures[0]}"}}\n{{"prompt": "And this?", "image": "{pictures[1]}"}}\n{{"prompt": "Hello"}}\n'
    )
    measure = Generation(battery=str(battery), new_tokens=5, temperature=0).pin()
    table = lab.read([Directory(path=str(folder))], [measure])
    assert table["image"].to_list() == [*pictures, None] and set(table["tokens"]) == {5}
    Image.new("RGB", (30, 40)).save(pictures[1])
    assert Generation(battery=str(battery), new_tokens=5, temperature=0).pin().key != measure.key, "another picture"


def test_a_model_without_eyes_says_so(lab, pictures, tmp_path):
    battery = tmp_path / "own.jsonl"
    battery.write_text(f'{{"prompt": "What is it?", "image": "{pictures[0]}"}}\n')
    with pytest.raises(
        RuntimeError, match="shows a picture, but this LlamaForCausalLM comes without an image processor"
    ):
        lab.read([Scratch()], [Generation(battery=str(battery), new_tokens=5)])


def test_pictures_that_are_not_what_they_say_are_refused(tmp_path):
    def refused(name, content, match):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match) as error:
            load_picture(str(path))
        assert name in str(error.value)

    with pytest.raises(ValueError, match=r"no file .*missing\.png"):
        load_picture(str(tmp_path / "missing.png"))
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    refused("empty.png", b"", "empty file")
    refused("text.png", b"not a picture at all", "no PNG or JPEG")
    refused("cut.png", file.getvalue()[: len(file.getvalue()) // 2], "damaged or cut off")
    for mode in ("RGBA", "L", "P", "1", "LA"):
        file = io.BytesIO()
        Image.new(mode, (8, 8)).save(file, "PNG")
        refused(f"mode-{mode}.png", file.getvalue(), f"in mode {mode}, expected RGB")
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    refused("bomb.png", file.getvalue(), "too large")
    file = io.BytesIO()
    Image.new("1", (8_000, 8_000)).save(file, "PNG")
    refused("large.png", file.getvalue(), "too large: 8000 × 8000")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF")
    refused("gif.png", file.getvalue(), "no PNG or JPEG")
