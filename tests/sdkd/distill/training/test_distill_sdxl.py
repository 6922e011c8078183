"""Training SDXL's students: the same trainer, told two texts and the sizes of every image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from made_once import made_once
from PIL import Image
from small_sdxl import sdxl_pipeline
from training_runs import RUN, job, latents, losses, same, sdkd, trained, trainer, weights

from sdkd.core.conditions import ADDED, TEXT_EMBEDS, TIME_IDS, nested
from sdkd.distill import TrainConfig, train
from sdkd.distill.data.buckets import View, fit, mirrored
from sdkd.distill.data.cache import write_cache
from sdkd.distill.data.disk_cache import DiskCache
from sdkd.distill.data.encode import STATES, TextParts, encode_captions
from sdkd.distill.data.opening import open_images
from sdkd.distill.training.config import make_config, read_recipe
from sdkd.distill.training.consistency import guidance_embedding
from sdkd.distill.training.run import run
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import InputError, ModelError
from sdkd.evaluate.agreement import make_probe, noise_agreement
from sdkd.families import SDXL
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.fused import Lora, with_loras
from sdkd.models.resolve import load_eager, resolve
from sdkd.students.blocks import build_student, copy_unet

SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
SIDE = 16  # pixels, 2 of them per latent
DEEP: dict[str, Any] = {"layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10)}


def pipeline(**unet: Any) -> StableDiffusionXLPipeline:
    """A teacher as deep as SDXL's students need."""
    return sdxl_pipeline(**(DEEP | unet))


def teacher() -> Path:
    """Its folder: not to be changed."""
    return made_once("deep-sdxl", lambda folder: write_pipeline(pipeline(), folder))


def images(count: int = 5) -> list[dict[str, Any]]:
    """Images of different sizes."""
    return [
        {"image": Image.new("RGB", (20 + 6 * n, 16 + n), (40 * n, 100, 50)), "caption": f"number {n}"}
        for n in range(count)
    ]


def pictures() -> Path:
    """A folder of them: not to be changed."""

    def draw(folder: Path) -> None:
        folder.mkdir()
        for row in images():
            row["image"].save(folder / f"{row['caption']}.png")
            (folder / f"{row['caption']}.txt").write_text(row["caption"])

    return made_once("wide-pictures", draw)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the pictures, with mirrored ones."""
    out = tmp_path_factory.mktemp("caches") / "sdxl"
    sdkd("cache", teacher(), pictures(), out, "--precision", "fp32", "--device", "cpu", "--flip", "--shard-images", 2)
    return out


def told(pipe: Any, captions: list[str], sizes: list[tuple[int, ...]]) -> dict[str, Any]:
    """What the pipeline itself would give its UNet for captions."""
    states, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    return {STATES: states, ADDED: {TEXT_EMBEDS: pooled, TIME_IDS: torch.tensor(sizes, dtype=torch.float32)}}


def test_text_is_the_pipelines_of_both_encoders() -> None:
    pipe = pipeline()
    captions = [f"a star {'x' * n}" for n in range(10)]
    found = encode_captions(TextParts.of(pipe), captions)
    assert {name: tuple(value.shape) for name, value in found.items()} == {STATES: (10, 77, 64), TEXT_EMBEDS: (10, 16)}
    torch.testing.assert_close(nested(found | {TIME_IDS: torch.zeros(1, 6)}), told(pipe, captions, [(0,) * 6]))


def test_sizes_are_of_the_image_the_crop_and_the_bucket() -> None:
    wide = Image.new("RGB", (201, 50))
    assert fit(wide, 100, 100).sizes == (50, 201, 0, 151, 100, 100)  # resized to 402 x 100
    assert fit(Image.new("RGB", (30, 60)), 32, 64).sizes == (60, 30, 48, 0, 32, 64)
    gradient = Image.linear_gradient("L").rotate(90).resize((203, 50))
    for seed in range(6):
        plain, other = (
            fit(gradient, 50, 50, crop="random", flip=flip, generator=torch.Generator().manual_seed(seed))
            for flip in (False, True)
        )
        twin = View(plain.pixels.flip(2), (50, 203, 0, 153 - plain.sizes[3], 50, 50))
        assert torch.equal(mirrored(plain).pixels, twin.pixels)
        assert mirrored(plain).sizes == twin.sizes
        assert other.sizes in (plain.sizes, twin.sizes)
        assert torch.equal(other.pixels, (plain if other.sizes == plain.sizes else twin).pixels)
        # Read of the picture: it is as bright at its left as the gradient there.
        at = 203 - 1 - twin.sizes[3]
        assert float(twin.pixels[0, 0, 0]) == pytest.approx(gradient.getpixel((at, 0)) / 127.5 - 1, abs=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_teacher_and_student_are_told_what_pipelines_tell(prediction: str) -> None:
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    one = trainer(pipe, images(), student="vega", caption_dropout=0.0)
    batch = one.batches.next()
    rows = [images()[index] for index, _, _ in batch.named]
    given = told(pipe, [row["caption"] for row in rows], [fit(row["image"], SIDE, SIDE).sizes for row in rows])
    torch.testing.assert_close(nested(batch.given), given)
    assert batch.given[TIME_IDS].dtype == torch.float32
    noisy = one.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    wanted = (
        batch.noise
        if prediction == "epsilon"
        else one.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    )
    with torch.no_grad():
        learnt, taught = (unet(noisy, batch.timesteps, **given).sample for unet in (one.unet, pipe.unet))
        found = one.losses(batch)
    torch.testing.assert_close(found["loss/output"], (learnt - taught).square().mean())
    torch.testing.assert_close(found["loss/task"], (learnt - wanted).square().mean())


@pytest.mark.parametrize("name", [spec.name for spec in SDXL.students])
def test_a_student_trains_on_its_pairs_and_from_a_cache_as_from_images(name: str, cache: Path) -> None:
    settings: dict[str, Any] = {"student": name, "flip": True, "crop": "center", "caption_dropout": 0.4}
    rows = trained(images(), pipeline(), **settings)
    stored = trained(DiskCache(cache), pipeline(), checkpointing=True, **settings)  # of the features, too
    assert same(weights(rows.unet), weights(stored.unet))
    assert rows.history[0]["loss/total"] == stored.history[0]["loss/total"]
    assert not same(weights(rows.unet), weights(build_student(pipeline().unet, name)))
    pairs = [key for key in rows.history[0] if key.startswith("loss/feature/")]
    ends = {"koala": ".attn1", "ssd-1": ("0", "1", "2", "mid_block"), "vega": ("0", "1", "2", "mid_block")}
    assert all(key.endswith(ends[name[:5].rstrip("-")]) for key in pairs)
    assert len(pairs) == {"ssd-1b": 26, "vega": 26, "koala-1b": 30, "koala-700m": 21}[name]


def test_a_cache_holds_both_texts_and_all_sizes(cache: Path, tmp_path: Path) -> None:
    found, pipe = DiskCache(cache), pipeline()
    text, sizes = found.text(0), found.sizes(4)
    assert text is not None
    assert {name: value.tolist() for name, value in text.items()} == {
        name: value[0].tolist() for name, value in encode_captions(TextParts.of(pipe), [found.captions[0]]).items()
    }
    assert sizes == fit(images()[4]["image"], SIDE, SIDE).sizes == (20, 44, 0, 9, 16, 16)
    assert found.sizes(4, True) == (20, 44, 0, 10, 16, 16)  # 35 pixels wide when resized
    found.check(pipe)
    pipe.text_encoder_2.text_projection.weight.data += 1
    with pytest.raises(InputError, match=r"was made by another model \(differs: text_encoder_2\)"):
        found.check(pipe)
    without = write_cache(pipeline(addition_embed_type=None), images(), tmp_path / "c", size=SIDE, precision="fp32")
    assert without is not None
    assert "added" not in without
    with pytest.raises(InputError, match=r"was made by another model \(differs: added\)"):
        DiskCache(tmp_path / "c").check(pipeline())


def test_buckets_tell_each_image_its_own_shape(tmp_path: Path) -> None:
    for number, size in enumerate(((256, 128), (128, 256), (256, 128), (99, 199))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("")
    one = trainer(pipeline(), open_images(tmp_path), student="koala-700m", buckets=True, resolution=128)
    seen = [one.batches.next() for _ in range(2)]
    for batch in seen:
        shape = [2 * side for side in batch.latents.shape[2:]]
        assert batch.given[TIME_IDS][:, 4:].tolist() == [shape] * 2
    assert {tuple(row) for batch in seen for row in batch.given[TIME_IDS][:, :2].tolist()} == {
        (128, 256), (256, 128), (199, 99),
    }  # fmt: skip


def test_latents_that_tell_no_sizes_are_of_whole_images() -> None:
    batch = trainer(pipeline(), latents(), student="koala-700m").batches.next()
    assert batch.given[TIME_IDS].tolist() == [[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2


def test_a_run_goes_on_and_is_a_pipeline_that_draws_and_is_tuned(tmp_path: Path) -> None:
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    settings: dict[str, Any] = {"student": "koala-700m", "ema": 0.9, "prompts": ("number 1",), "sample_steps": 1}
    run(job(whole, model=teacher(), data=pictures(), **settings))
    run(job(parts, model=teacher(), data=pictures(), **(settings | {"steps": 1, "schedule": "cosine"})))
    run(job(parts, model=teacher(), data=pictures(), resume="auto", **settings))
    assert losses(whole)[0] == losses(parts)[0]
    assert (parts / "samples" / "step-000002.png").is_file()
    loaded = StableDiffusionXLPipeline.from_pretrained(whole, local_files_only=True)
    assert loaded.unet.config.mid_block_type is None
    assert resolve(whole).family is SDXL
    assert loaded("number 1", num_inference_steps=1, output_type="np").images.shape == (1, SIDE, SIDE, 3)
    words = ["--model", whole, "--data", pictures(), "--output", tmp_path / "tuned", *SMALL]
    sdkd("finetune", *words, "--prompts", "number 1", "--sample-steps", 1)
    assert not same(weights(tmp_path / "tuned"), weights(whole))
    assert weights(tmp_path / "tuned").keys() == weights(whole).keys()
    assert "tags: [stable-diffusion-xl, fine-tuned]" in (tmp_path / "tuned" / "README.md").read_text()


def test_going_on_gives_the_weights_of_an_uninterrupted_run(cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(**(RUN | {"student": "koala-1b", "schedule": "constant", "save_every": 1}))
    runs = []
    for folder, resume in ((tmp_path / "a", None), (tmp_path / "b", tmp_path / "a" / "checkpoint-1")):
        folder.mkdir()
        pipe = pipeline()
        runs.append(
            train(pipe, build_student(pipe.unet, "koala-1b"), DiskCache(cache), config, folder=folder, resume=resume)
        )
    assert same(weights(runs[0].unet), weights(runs[1].unet))


@pytest.mark.parametrize("embedding", [0, 16])
def test_consistency_leads_away_from_zeros_as_the_pipeline_does(embedding: int, tmp_path: Path) -> None:
    pipe = pipeline()
    config = TrainConfig(
        **(RUN | {"objective": "consistency", "student": "koala-700m", "guidance_embedding": embedding})
    )
    student = build_student(pipe.unet, "koala-700m")
    if embedding:
        student = copy_unet(student, time_cond_proj_dim=embedding)
    one = Trainer(pipe, student, images(), config)
    batch = one.batches.next()
    assert batch.empty is not None
    assert batch.guidance is not None
    assert batch.empty.keys() == batch.given.keys()
    assert all(not batch.empty[name].any() for name in (STATES, TEXT_EMBEDS))
    assert torch.equal(batch.empty[TIME_IDS], batch.given[TIME_IDS])
    solver = one.solver
    assert solver is not None
    noisy = one.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    added = {"timestep_cond": guidance_embedding(batch.guidance, embedding)} if embedding else {}
    with torch.no_grad():
        cond, uncond = (
            pipe.unet(noisy, batch.timesteps, **nested(given)).sample for given in (batch.given, batch.empty)
        )
        mixed = cond + batch.guidance[:, None, None, None] * (cond - uncond)
        earlier = solver.before(batch.timesteps)
        before = solver.mix(*solver.split(mixed, noisy, batch.timesteps), earlier)
        ends = [
            solver.answer(student(sample, at, **nested(batch.given), **added).sample, sample, at)
            for sample, at in ((noisy, batch.timesteps), (before, earlier))
        ]
        found = one.losses(batch)["loss/consistency"]
    expected = ((ends[0] - ends[1]).square() + 1e-6).sqrt().mean() - 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    one.close()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    other = Trainer(pipe, student, images(), config).batches.next().empty
    assert other is not None
    torch.testing.assert_close(other[STATES][1:], encode_captions(TextParts.of(pipe), [""])[STATES])


def test_the_command_makes_a_student_for_few_steps(tmp_path: Path) -> None:
    words = ["--data", pictures(), *SMALL, "--objective", "consistency"]
    student = ["--student", "koala-700m", "--guidance-embedding", 16]
    sdkd("distill", "--teacher", teacher(), "--output", tmp_path / "few", *words, *student)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path / "few", local_files_only=True)
    assert type(loaded.scheduler).__name__ == "LCMScheduler"
    assert loaded.unet.config.time_cond_proj_dim == 16
    assert loaded("number 1", num_inference_steps=1, guidance_scale=8.0, output_type="np").images.shape[1] == SIDE


@pytest.mark.parametrize("objective", ["lora", "consistency"])
def test_diffusers_loads_what_the_lora_command_wrote(objective: str, tmp_path: Path) -> None:
    model = made_once("shallow-sdxl", lambda folder: write_pipeline(sdxl_pipeline(), folder))
    words = ["--model", model, "--data", pictures(), "--output", tmp_path / "out", "--objective", objective, *SMALL]
    sdkd("lora", *words, "--lora-rank", 2, "--lora-targets", "all", "--learning-rate", 0.01)
    pipe: Any = load_eager(model)
    given = told(pipe, ["number 1"], [(SIDE, SIDE, 0, 0, SIDE, SIDE)])
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = pipe.unet(sample, torch.tensor(500), **given).sample
        pipe.load_lora_weights(tmp_path / "out")
        after = pipe.unet(sample, torch.tensor(500), **given).sample
        merged = load_eager(with_loras(resolve(model), [Lora.of(tmp_path / "out")])).unet
        torch.testing.assert_close(merged(sample, torch.tensor(500), **given).sample, after, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    (adapter,) = pipe.unet.peft_config.values()
    assert adapter.r == 2


def test_agreement_with_an_sdxl_teacher(cache: Path) -> None:
    pipe, student = pipeline(), pipeline()
    student.unet = build_student(pipe.unet, "vega").eval()
    probe = make_probe(pipe, images(2), 2)
    assert noise_agreement(pipe, probe).mean == 0
    found = noise_agreement(student, probe)
    given = told(pipe, ["number 1"], [fit(images()[1]["image"], SIDE, SIDE).sizes])
    sample, step = probe.noisy[1, 3:4], probe.timesteps[1, 3:4]
    with torch.no_grad():
        own, other = (one.unet(sample, step, **given).sample for one in (student, pipe))
    assert found.per_image[1][3] == pytest.approx(float((own - other).square().mean()), rel=1e-4)
    stored = make_probe(pipe, DiskCache(cache), 2)
    torch.testing.assert_close(stored.answers, probe.answers)
    with pytest.raises(ModelError, match="its UNet has addition_embed_type None, the teacher's has text_time"):
        noise_agreement(pipeline(addition_embed_type=None), probe)


def test_a_small_vae_of_sdxl(tmp_path: Path) -> None:
    out = tmp_path / "vae"
    words = ["--width", 4, "--blocks", 1, *(word for word in SMALL if "log" not in word)]
    sdkd("vae-distill", "--vae-of", teacher(), "--data", pictures(), "--output", out, *words)
    assert (out / "diffusion_pytorch_model.safetensors").is_file()
    assert "tags: [stable-diffusion-xl, vae, taesd" in (out / "README.md").read_text()


def test_what_is_not_trained_is_refused_by_name(tmp_path: Path) -> None:
    painting = tmp_path / "painting"
    write_pipeline(pipeline(in_channels=9), painting)
    for settings, message in (
        (
            {"student": "tiny"},
            "sd-tiny is a student of Stable Diffusion 1.x, 2.x, .* of SDXL, whose students are ssd-1b",
        ),
        ({"student": "vega", "pairs": "bk-sdm"}, "pairs 'bk-sdm' are of students of Stable Diffusion"),
        (
            {"student": "vega", "model": painting},
            "takes 9 channels, its VAE gives 4: inpainting and depth models cannot",
        ),
        (
            {"student": "vega", "precision": "fp16"},
            "SDXL's VAE overflows in fp16 .*: give --precision bf16, or a model",
        ),
    ):
        with pytest.raises((InputError, ModelError), match=message):
            run(job(tmp_path / "out", **({"model": teacher(), "data": pictures()} | settings)))
    with pytest.raises(ModelError, match="vega is a student of SDXL, and this UNet is one of Stable Diffusion"):
        run(job(tmp_path / "out", student="vega"))
    assert not (tmp_path / "out").exists()


def test_every_student_has_a_recipe_at_sdxls_size() -> None:
    for spec in SDXL.students:
        config = make_config(*read_recipe(spec.name, "distill"))
        assert (config.spec, config.pair_preset, config.weights) == (spec, spec.pairs, spec.weights)
        assert (config.resolution, config.batch_size * config.accumulation) == (1024, 128)
    few = make_config(*read_recipe("lcm-sdxl", "distill"))
    assert (few.objective, few.student, few.target_ema) == ("consistency", "same", 0.95)
