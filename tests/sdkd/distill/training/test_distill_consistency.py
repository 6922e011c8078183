"""Consistency distillation: the same mathematics as diffusers' schedulers, and one trainer for all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)
from training_runs import RUN, job, latents, pictures, sdkd, teacher, trained, trainer, unet_output, weights

from sdkd.distill import TrainConfig, train
from sdkd.distill.data.encode import STATES
from sdkd.distill.training.config import make_config, objective_of, read_recipe
from sdkd.distill.training.consistency import Solver, guidance_embedding, guided, pseudo_huber
from sdkd.distill.training.drawing import result_scheduler
from sdkd.distill.training.run import run
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import InputError, ModelError
from sdkd.models.diffusers_folder import provenance, write_pipeline
from sdkd.models.fused import Lora, with_loras
from sdkd.models.generation import FEW_STEPS, Generation, entry
from sdkd.models.resolve import resolve
from sdkd.students.blocks import build_student, copy_unet

NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
ZERO_SNR = {"rescale_betas_zero_snr": True}


def normal(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes", [{}, {"prediction_type": "v_prediction"}, ZERO_SNR | {"prediction_type": "v_prediction"}]
)
def test_the_solver_steps_and_answers_as_diffusers_schedulers_do(changes: dict[str, Any]) -> None:
    solver = Solver(DDPMScheduler(**NOISE, **changes), 50, torch.device("cpu"))
    lcm = LCMScheduler(**NOISE, **changes, original_inference_steps=50)
    lcm.set_timesteps(50)
    assert lcm.timesteps.tolist() == sorted(solver.points, reverse=True)
    ddim = DDIMScheduler(**NOISE, **changes, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    ddim.set_timesteps(50)
    times = torch.tensor([999, 519, 19])
    assert solver.before(times).tolist() == [979, 499, 0]
    kept = lcm.alphas_cumprod[times]
    snr = kept / (1 - kept) + bool(changes)  # of velocity one more
    torch.testing.assert_close(solver.weights(times, 5.0), snr.clamp(max=5.0).sqrt(), rtol=1e-4, atol=1e-6)
    sample, output = normal(1), normal(2)
    stepped = solver.mix(*solver.split(output, sample, times), solver.before(times))
    answers = solver.answer(output, sample, times)
    for row, time in enumerate(times.tolist()):
        one = ddim.step(output[row : row + 1], time, sample[row : row + 1]).prev_sample
        torch.testing.assert_close(stepped[row : row + 1], one, rtol=1e-4, atol=1e-5)
        lcm.set_timesteps(50)
        found = lcm.step(output[row : row + 1], time, sample[row : row + 1], generator=torch.manual_seed(0)).denoised
        torch.testing.assert_close(answers[row : row + 1], found, rtol=1e-4, atol=1e-5)


def test_loss_guidance_and_embedding() -> None:
    one, other = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])
    assert float(pseudo_huber(one, other, 4.0)) == pytest.approx((5.0 - 4.0) / 2)
    assert float(pseudo_huber(one, other, 4.0, torch.tensor([3.0]))) == pytest.approx(3 * (5.0 - 4.0) / 2)
    both = torch.cat([normal(1), normal(2)])
    expected = normal(1) + torch.tensor([1.0, 2.0, 3.0])[:, None, None, None] * (normal(1) - normal(2))
    torch.testing.assert_close(guided(both, torch.tensor([1.0, 2.0, 3.0])), expected)
    w = torch.tensor([5.0, 7.5])
    for width in (256, 7):
        usual = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, width)  # type: ignore[arg-type]
        torch.testing.assert_close(guidance_embedding(w, width), usual, rtol=0, atol=1e-3)  # of angles up to 7,500


@pytest.mark.parametrize(("embedding", "gamma"), [(0, 0.5), (16, 0.0)])
def test_the_losses_of_a_batch_are_those_of_the_paper(embedding: int, gamma: float) -> None:
    pipe = helpers.tiny_pipeline()
    settings: dict[str, Any] = {"guidance_embedding": embedding, "feature_weight": 0.5, "guidance": (2.0, 4.0)}
    settings["snr_gamma"] = gamma
    config = TrainConfig(**(RUN | {"objective": "consistency"} | settings))
    student = build_student(pipe.unet, "tiny")
    if embedding:
        student = copy_unet(student, time_cond_proj_dim=embedding)
        torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.1)
    made = Trainer(pipe, student, latents(), config)
    batch = made.batches.next()
    assert batch.guidance is not None
    assert batch.empty is not None
    assert ((batch.guidance >= 2) & (batch.guidance <= 4)).all()
    assert {int(time) % 20 for time in batch.timesteps} == {19}
    torch.testing.assert_close(batch.empty[STATES][1:], made.batches.encode_text([""])[STATES])
    losses = made.losses(batch)

    ddim = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(50)
    lcm = LCMScheduler.from_config(pipe.scheduler.config)
    distances = []
    with torch.no_grad():
        for row, time in enumerate(batch.timesteps):
            cut = slice(row, row + 1)
            noisy = ddim.add_noise(batch.latents[cut], batch.noise[cut], time[None])
            cond, uncond = (pipe.unet(noisy, time, text[STATES][cut]).sample for text in (batch.given, batch.empty))
            w = batch.guidance[row]
            before = ddim.step(cond + w * (cond - uncond), time, noisy).prev_sample
            added = {"timestep_cond": guidance_embedding(w[None], embedding)} if embedding else {}
            ends = []
            for sample, at in ((noisy, time), (before, max(time - 20, torch.tensor(0)))):
                lcm.set_timesteps(50)
                output = student(sample, at, batch.given[STATES][cut], **added).sample
                skip, out = lcm.get_scalings_for_boundary_condition_discrete(at)
                signal = lcm.alphas_cumprod[at].sqrt()
                ends.append(skip * sample + out * (sample - (1 - signal**2).sqrt() * output) / signal)
            snr = lcm.alphas_cumprod[time] / (1 - lcm.alphas_cumprod[time])
            factor = snr.clamp(max=gamma).sqrt() if gamma else 1.0
            distances.append(factor * (((ends[0] - ends[1]).square() + 1e-6).sqrt().mean() - 1e-3))
    torch.testing.assert_close(losses["loss/consistency"].detach(), torch.stack(distances).mean(), rtol=1e-3, atol=1e-5)
    pairs = [value for name, value in losses.items() if name.startswith("loss/feature/")]
    assert len(pairs) == 6
    torch.testing.assert_close(losses["loss/feature"], torch.stack(pairs).sum())
    torch.testing.assert_close(losses["loss/total"], losses["loss/consistency"] + 0.5 * losses["loss/feature"])


def test_training_brings_the_ends_together_and_a_target_follows() -> None:
    pipe = helpers.tiny_pipeline()
    before = weights(pipe.unet)
    config = TrainConfig(**(RUN | {"objective": "consistency", "student": "same", "feature_weight": 0.1}))
    same_blocks = Trainer(pipe, copy_unet(pipe.unet), latents(), config)
    levels = range(4)
    assert same_blocks.names == [
        *(f"down_blocks.{n}" for n in levels),
        "mid_block",
        *(f"up_blocks.{n}" for n in levels),
    ]
    batch, optimizer = same_blocks.batches.next(), torch.optim.Adam(same_blocks.parameters, 1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        found = same_blocks.losses(batch)
        found["loss/total"].backward()
        optimizer.step()
        losses.append(float(found["loss/consistency"].detach()))
    assert losses[-1] < 0.9 * losses[0]
    same_blocks.close()
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe.unet).items())

    made = trainer(objective="consistency", target_ema=0.75, learning_rate=1e-3)
    assert made.target is not None
    start, first = weights(made.unet), weights(made.target.unet)
    assert all(torch.equal(first[name], value) for name, value in start.items())
    made.step()
    for name, value in made.target.unet.named_parameters():
        own = dict(made.unet.named_parameters())[name]
        torch.testing.assert_close(value, start[name] + 0.25 * (own - start[name]))


def test_a_lora_learns_from_its_own_model_or_from_another_teacher() -> None:
    pipe = helpers.tiny_pipeline()
    plain = unet_output(pipe.unet)
    config = TrainConfig(**(RUN | {"objective": "consistency-lora", "lora_rank": 2, "lora_targets": "all"}))
    made = Trainer(pipe, pipe.unet, latents(), config)
    made.step()
    made.step()
    assert made.teacher is not None
    assert torch.equal(unet_output(made.teacher.unet), plain)  # the same weights, without the update
    twin = dict(made.teacher.unet.named_parameters())
    assert twin["conv_in.weight"].data_ptr() == pipe.unet.conv_in.weight.data_ptr()
    assert not torch.equal(unet_output(pipe.unet.eval()), plain)
    assert "up_blocks.0.upsamplers.0.conv.lora_A.default.weight" in dict(pipe.unet.named_parameters())

    student = helpers.tiny_pipeline(student="sd-tiny")
    taught = Trainer(student, student.unet, latents(), config, teacher=helpers.tiny_unet(3))
    assert {*taught.digests} == {"data", "model", "teacher"}
    assert taught.step()["loss/consistency"] > 0


def test_the_command_writes_a_pipeline_that_draws_in_few_steps(tmp_path: Path) -> None:
    out, words = tmp_path / "out", ["--objective", "consistency", "--guidance-embedding", 16, "--guidance", 2, 4]
    sdkd(
        "distill", "--teacher", teacher(), "--data", pictures(), "--output", out, *SMALL, *words, "--prompts", "all red"
    )
    pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert type(pipe.scheduler) is LCMScheduler
    assert pipe.unet.config.time_cond_proj_dim == 16
    assert pipe("all red", num_inference_steps=2, guidance_scale=4.0, output_type="np").images.shape == (1, 64, 64, 3)
    about = provenance(out)
    assert about["generation"] == {"steps": 4, "guidance_scale": 5.0, "scheduler": "LCMScheduler"}
    assert (about["student"], about["objective"]) == ("sd-tiny", "consistency")
    card = (out / "README.md").read_text()
    assert "w 2 to 4, DDIM solver of 50 points" in card
    assert "num_inference_steps=4, guidance_scale=5" in card
    with pytest.raises(
        InputError, match=r"model '.*out' draws in few steps already, .*needs a teacher that takes many"
    ):
        run(job(tmp_path / "again", model=out, objective="consistency"))
    lora = tmp_path / "lora"
    words = ["--objective", "consistency", "--lora-rank", 2, "--teacher", teacher()]
    student = tmp_path / "student"
    write_pipeline(helpers.tiny_pipeline(student="sd-tiny"), student)
    sdkd("lora", "--model", student, "--data", pictures(), "--output", lora, *SMALL, *words)
    assert json.loads((lora / "sdkd.json").read_text())["teacher"] == str(teacher())
    for folder in (lora, lora / "checkpoint-2" / "lora"):
        assert Lora.of(folder).generation == FEW_STEPS
    assert "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)" in (lora / "README.md").read_text()
    again: dict[str, Any] = {"model": student, "objective": "consistency-lora", "lora_rank": 2, "resume": "auto"}
    assert "finished before" in run(job(lora, teacher_of_lora=teacher(), **again))["remarks"][0]
    write_pipeline(helpers.tiny_pipeline(seed=7), tmp_path / "other")
    for other in (tmp_path / "other", None):
        with pytest.raises(InputError, match="was trained with another teacher: give the same again"):
            run(job(lora, teacher_of_lora=other, **again))
    with pytest.raises(InputError, match=r"teacher '.*' is for a LoRA of --objective consistency: leave it out"):
        run(job(tmp_path / "x", objective="lora", teacher_of_lora=teacher()))


def test_what_a_few_step_model_becomes_is_run_as_it_is(tmp_path: Path) -> None:
    few, model = Generation(3, 1.5, "LCMScheduler"), tmp_path / "few"
    write_pipeline(helpers.tiny_pipeline(), model, about=entry(few))
    for objective, starts in (("finetune", None), ("finetune", teacher()), ("distill", None), ("lora", None)):
        out = tmp_path / f"{objective}{'' if starts is None else '-init'}"
        done = run(job(out, model=model, objective=objective, steps=1, init=starts))
        kept = objective != "lora" and starts is None  # a LoRA leaves it to its model; other weights, to nobody
        for folder in (out, out / "checkpoint-1"):
            assert provenance(folder).get("generation") == (few.to_json() if kept else None)
        said = ["is (3 steps, guidance 1.5, LCMScheduler); the task" in line for line in done["remarks"]]
        assert said == [True] * kept
        assert ("num_inference_steps=3, guidance_scale=1.5" in (out / "README.md").read_text()) is kept
    assert with_loras(resolve(model), [tmp_path / "lora"]).generation == few
    config = TrainConfig(objective="lora")
    assert type(result_scheduler(helpers.tiny_pipeline().scheduler, config, few)) is LCMScheduler


def test_what_does_not_go_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, message in {
        ("distill", "student=same"): "'same' has all of its teacher's blocks, which is for --objective consistency",
        ("consistency", "student=same pairs=segmind"): "pairs 'segmind' are of students with fewer blocks",
        ("consistency", "guidance_embedding=3"): "guidance_embedding 3 holds no sines and cosines: give 256",
        ("consistency", "task_weight=1"): "setting 'task_weight' is unknown to consistency",
        ("consistency-lora", "target_ema=0.9"): "setting 'target_ema' is unknown to consistency-lora",
    }.items():
        values: dict[str, Any] = dict(word.split("=") for word in settings[1].split())
        values = {key: float(value) if value[0].isdigit() else value for key, value in values.items()}
        with pytest.raises(InputError, match=message):
            make_config(settings[0], values | ({"guidance_embedding": 3} if "embedding" in settings[1] else {}))
    with pytest.raises(InputError, match=r"guidance \(9.0, 2.0\) is no range: give the smaller number first"):
        TrainConfig(objective="consistency", guidance=(9.0, 2.0))
    with pytest.raises(InputError, match="guidance 5000"):
        TrainConfig(objective="consistency", guidance=(2.0, 5000))
    with pytest.raises(InputError, match="solver_steps 2000"):
        TrainConfig(objective="consistency", solver_steps=2000)
    with pytest.raises(InputError, match="objective 'task' is unknown to sdkd lora: choose lora or consistency"):
        objective_of("lora", "task")
    with pytest.raises(InputError, match="recipe 'lcm-lora' is for sdkd lora, not for sdkd distill"):
        read_recipe("lcm-lora", "distill")
    words = ["--teacher", "t", "--data", "d", "--output", tmp_path, "--recipe", "sd-tiny", "--objective", "consistency"]
    with pytest.raises(SystemExit, match="1"):
        sdkd("distill", *words)
    assert "recipe 'sd-tiny' is not of --objective consistency: leave one of them out" in capsys.readouterr().err
    pipe = helpers.tiny_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **ZERO_SNR)
    with pytest.raises(ModelError, match=r"ends in noise alone \(zero terminal SNR\)"):
        trained(latents(), pipe, objective="consistency")
    embedded = helpers.tiny_pipeline()
    embedded.unet = helpers.tiny_unet(time_cond_proj_dim=8)
    with pytest.raises(ModelError, match="takes the guidance scale as an input"):
        train(embedded, embedded.unet, latents(), TrainConfig(**(RUN | {"objective": "finetune"})))
    write_pipeline(embedded, tmp_path / "embedded")
    other = helpers.tiny_pipeline()
    write_pipeline(other, tmp_path / "wide", unet=helpers.tiny_unet(cross_attention_dim=96))
    said: list[str] = []  # nothing: before weights are read
    for model, objective, more, message in (
        ("embedded", "lora", {}, "takes the guidance scale as an input"),
        ("embedded", "distill", {}, "takes the guidance scale as an input"),
        (None, "consistency", {"init": teacher()}, r"--init '.*' is not the sd-tiny of this teacher"),
        (
            *(None, "consistency", {"init": tmp_path / "embedded", "student": "same"}),
            r"is not a copy of this teacher \(time_cond_proj_dim: expected None, found 8\): give --guidance-emb",
        ),
        (
            *(None, "consistency-lora", {"teacher_of_lora": tmp_path / "wide"}),
            r"two UNets of one run take other text embeddings \(cross_attention_dim 32 and 96\): give models of one",
        ),
    ):
        asked = job(tmp_path / "out", model=model and tmp_path / model, objective=objective, **more)
        with pytest.raises(ModelError, match=message):
            run(asked, lambda text, _: said.append(text))
    assert not said
    velocity = helpers.tiny_pipeline(student="sd-tiny")
    velocity.scheduler = DDIMScheduler.from_config(velocity.scheduler.config, prediction_type="v_prediction")
    write_pipeline(velocity, tmp_path / "v")
    with pytest.raises(InputError, match=r"--init '.*v' was trained with prediction_type 'v_prediction', .* 'epsilon'"):
        run(job(tmp_path / "out", init=tmp_path / "v"))
