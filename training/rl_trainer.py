"""TRL's trainer of group relative policy optimization, for prompts with any number of ECGs."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, flush_left, pad

from elm_ecg.training.checkpoints import WholeCheckpoints
from elm_ecg.training.features import EncoderFeatures
from elm_ecg.training.files import atomic_path
from elm_ecg.training.lora import keep_statistics
from elm_ecg.training.muon import OptimizesByMuon
from elm_ecg.training.packing import (
    ROW_TOKENS,
    keeps_apart,
    mask_of,
    max_tokens_to_share,
    pack,
    packed_width,
    shared_rows,
)
from elm_ecg.training.rl_answers import Answers, draw_answers
from elm_ecg.training.rl_prompts import Prompts, cat_ecgs
from elm_ecg.training.rl_sampling import answer_prompts, positions_of
from elm_ecg.training.sampling import DRAWING
from elm_ecg.training.trainer import gather_head, labelled_places

ROW_MEANS = ("grpo", "sapo", "dr_grpo", "luspo")  # losses that divide by the number of answers; the others count tokens
CONDITIONS = ("ecg", "zeros")  # of evaluation: with the ECG, and with zeros in its place
EQUAL = 1e-6  # of rewards: no difference, but for rounding


class PromptSampler(RepeatSampler):
    """TRL's order of prompts, another one in each epoch, the same wherever a run begins."""

    def set_epoch(self, epoch: int) -> None:
        """Called at the begin of each epoch."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class ELMGRPOTrainer(OptimizesByMuon, WholeCheckpoints, GRPOTrainer):
    """TRL's trainer for ELMs.

    TRL knows pictures of a few vision-language models. Here the rows of a batch carry the numbers of their prompts, under the name
    `pixel_values` that TRL hands on, and the ECGs are looked up where the model is run. Each prompt is read once for all answers to
    it. Groups of answers with equal rewards, which teach nothing, count neither in the loss nor in what it is divided by.

    Args:
        prompts: those of training, and in evaluation those of each of `CONDITIONS`; `train_dataset` and `eval_dataset` hold
            numbers of their rows.
        processor: of the model.
        draw_steps, draw_prompts, answers_dir: every so many steps answers to so many prompts are drawn there.
        kwargs: for `WholeCheckpoints` and TRL's trainer.

    `features`, where they are kept, take the place of the ECGs.
    """

    # of TRL and transformers, which say less of them, or None where a trainer without model would have it
    args: Any
    model: Any
    ref_model: Any
    processing_class: Any
    train_dataset: Any
    num_generations: Any
    num_generations_eval: Any
    shuffle_dataset: Any
    _buffered_inputs: Any

    def __init__(
        self,
        *,
        prompts: dict[str, Prompts],
        processor: Any,
        draw_steps: int = 0,
        draw_prompts: int = 1,
        answers_dir: Path | None = None,
        **kwargs: Any,
    ):
        args = kwargs["args"]
        # TRL would load the model of reference from its folder; it is a copy of this one, or this one without its adapter
        beta, sync, args.beta, args.sync_ref_model = args.beta, args.sync_ref_model, 0.0, False
        super().__init__(processing_class=processor.tokenizer, **kwargs)
        self.processing_class = self.callback_handler.processing_class = processor  # what is saved beside the model
        self.beta = args.beta = beta
        args.sync_ref_model = sync
        if beta and not isinstance(self.model, PeftModel):
            self._add_reference()
        self.prompts = prompts
        self.draw_steps, self.draw_prompts, self.answers_dir = draw_steps, draw_prompts, answers_dir
        self.features: EncoderFeatures | None = None
        self.groups = {"trained": 0, "skipped": 0}
        # condition -> row -> its rewards at the first evaluation of the run and at the last
        self.evaluated: dict[str, dict[str, list[float]]] = {}
        self._numbers: list[int] = []  # of the rows that are answered now
        self._of = "train"  # key of `prompts`
        self._rewards = torch.empty(0)  # [answers of all processes, rewards]
        self._texts: list[str] = []
        self._shares: bool | None = None  # whether prompts are read once for all answers, as soon as that is known
        self._tokens_to_share = 0

    def _add_reference(self) -> None:
        """The model as it is now, from which --beta keeps the policy near."""
        reference: Any = copy.deepcopy(self.model).requires_grad_(False)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    @property
    def generate_every(self) -> int:
        """Batches that are trained on before answers are written again."""
        return self.args.steps_per_generation * self.num_iterations

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        """As TRL's, which goes on from a checkpoint with the order of the first epoch."""
        return PromptSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.generate_every,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As TRL's, of the rows with these numbers; what it returns has the numbers too, and groups with equal rewards are masked."""
        mode = "train" if self.model.training else "eval"
        self._of = inputs[0].get("condition", "train")
        prompts, self._numbers = self.prompts[self._of], [int(row["row"]) for row in inputs]
        prompts.keep(self._numbers)
        output = super()._generate_and_score_completions([prompts.row(number) for number in self._numbers])
        device = output["prompt_ids"].device
        output["pixel_values"] = torch.tensor(self._numbers, device=device)
        group = self.num_generations if mode == "train" else self.num_generations_eval
        if mode == "eval":
            return output
        kept = ~_equal_groups(self._summed(), group)  # [groups of all processes]
        self.groups["trained"] += int(kept.sum())
        self.groups["skipped"] += int((~kept).sum())
        self._metrics[mode]["skipped_groups"].append(float((~kept).sum()))
        kept = kept.repeat_interleave(group)
        own = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        output["completion_mask"] = output["completion_mask"] * kept[own, None].to(device)
        output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        # a loss that divides by all answers is to divide by those that are left
        factor = len(kept) / max(1, int(kept.sum())) if self.loss_type in ROW_MEANS else 1.0
        output["row_factor"] = torch.tensor(factor, device=device)
        self._draw(output["advantages"], own)
        return output

    def _summed(self) -> torch.Tensor:
        """What decides whether the answers of a group differ: [answers of all processes, 1], or each reward by itself where it is
        normalised by itself."""
        rewards = self._rewards.nan_to_num(0.0)
        if self.multi_objective_aggregation == "normalize_then_sum":
            return rewards
        return (rewards * self.reward_weights.to(rewards.device)).sum(1, keepdim=True)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The tokens of the rows that are answered now, with those of their ECGs."""
        return [self.prompts[self._of][number].input_ids for number in self._numbers], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], None]:
        """Answers [tokens] to the rows that are answered now, each up to its end of text."""
        unique = list(dict.fromkeys(self._numbers))
        places = {number: place for place, number in enumerate(unique)}
        rows = [torch.tensor(self.prompts[self._of][number].input_ids) for number in unique]
        left: Any = {"padding_side": "left", "pad_to_multiple_of": self.pad_to_multiple_of}
        device = self.accelerator.device
        input_ids = pad(rows, padding_value=self._tokenizer.pad_token_id, **left).to(device)
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, **left).to(device)
        options = self.generation_kwargs
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=options | DRAWING,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            self.accelerator.autocast(),
            _evaluating(model),
        ):
            answers = answer_prompts(
                model,
                input_ids,
                mask,
                self._ecg_inputs(unique),
                [places[number] for number in self._numbers],
                self._seeds(),
                options,
            )
        ends = torch.isin(answers, torch.tensor(self.eos_token_ids, device=device)).cpu()
        lengths = [int(row.int().argmax()) + 1 if row.any() else len(row) for row in ends]
        return [row[:length].tolist() for row, length in zip(answers.cpu(), lengths, strict=True)], None

    def _seeds(self) -> list[list[int]]:
        """For each answer of this process numbers of its own: of evaluations the same each time."""
        group, time = self.num_generations_eval, 0
        if self._of == "train":
            group, time = self.num_generations, 1 + self._step // self.generate_every
        first = self.accelerator.process_index * len(self._numbers)
        return [[self.args.seed, time, number, (first + i) % group] for i, number in enumerate(self._numbers)]

    def _ecg_inputs(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """The ECGs of these rows as the model takes them, on its device."""
        ecgs = cat_ecgs(self.prompts[self._of if not self.model.training else "train"][number] for number in numbers)
        if self.features is not None:
            return self.features.replace(ecgs)
        return {name: values.to(self.accelerator.device) for name, values in ecgs.items()}

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """As TRL's, of the answers as they are read everywhere: [answers of all processes, rewards]."""
        self._texts = self.processing_class.decode_answers(completion_ids_list)
        completions = [[{"role": "assistant", "content": text}] for text in self._texts]
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._of != "train":
            weighted = (self._rewards.nan_to_num(0.0) * self.reward_weights.to(self._rewards.device)).sum(1)
            ended: dict[str, list[float]] = defaultdict(list)
            for number, reward in zip(gather_object(self._numbers), weighted.tolist(), strict=True):
                ended[str(number)].append(reward)
            of_condition = self.evaluated.setdefault(self._of, {})
            for number, rewards in ended.items():
                mean = sum(rewards) / len(rewards)
                of_condition[number] = [of_condition.get(number, [mean])[0], mean]
        return self._rewards

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As TRL's: log-probabilities and entropies [rows, logits_to_keep], 0 where there is no token, and the loss of experts.

        Args:
            pixel_values: [rows], the numbers of the prompts; None: of those that are answered now.
        """
        if self._shares is None:
            self._shares = self._may_share(model)
        keep_statistics(model)
        numbers = self._numbers if pixel_values is None else pixel_values.tolist()
        answered = attention_mask[:, -logits_to_keep:].bool()  # [rows, logits_to_keep]
        logps, entropies = (torch.zeros(answered.shape, device=input_ids.device) for _ in range(2))
        scored = answered.any(1).nonzero()[:, 0].tolist() or [0]  # rows; gradients need one
        positions = positions_of(attention_mask)
        gather_head(self.model)
        aux_losses = []
        starts = [*range(0, len(scored), batch_size or len(scored)), len(scored)]
        for start, end in pairwise(starts):
            rows = scored[start:end]
            labels = input_ids[rows].masked_fill(attention_mask[rows] == 0, -100)
            labels[:, :-logits_to_keep] = -100
            if (labels == -100).all():  # all answers are masked: one token, which the loss does not count
                labels[0, -logits_to_keep] = input_ids[rows[0], -logits_to_keep]
            inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows], "labels": labels}
            inputs["position_ids"] = positions[rows]
            prompts, order = [numbers[row] for row in rows], [*range(len(rows))]
            if self._shares and answered.any() and not compute_aux_loss:  # of experts all tokens count
                inputs, prompts, order = self._answers_behind_prompts(inputs, prompts, logits_to_keep)
            with self.accelerator.autocast():
                outputs = model(
                    **inputs | labelled_places(inputs["labels"]),
                    **self._ecg_inputs(prompts),
                    **({"output_router_logits": True} if compute_aux_loss else {}),
                    fused_lm_head=True,
                )
            rows, here = [rows[place] for place in order], labels[order, -logits_to_keep:] != -100
            where = torch.tensor(rows, device=input_ids.device)[here.nonzero()[:, 0]], here.nonzero()[:, 1]
            logps = logps.index_put(where, outputs.log_probs[0].to(logps.dtype))
            if compute_entropy:
                entropies = entropies.index_put(where, outputs.entropy[0].to(entropies.dtype))
            if compute_aux_loss:
                aux_losses.append(outputs.aux_loss)
        aux_loss = torch.stack(aux_losses).mean() if compute_aux_loss else None
        return logps, entropies if compute_entropy else None, aux_loss

    def _may_share(self, model: Any) -> bool:
        """Whether the model can read a prompt once for all answers behind it, each as if it were alone."""
        self._tokens_to_share = max_tokens_to_share(self.model.config.text_config)
        with self.accelerator.autocast():
            return self._tokens_to_share > 0 and keeps_apart(model, self.model, self.accelerator.device, share=True)

    def _answers_behind_prompts(
        self, inputs: dict[str, Any], prompts: list[int], logits_to_keep: int
    ) -> tuple[dict[str, Any], list[int], list[int]]:
        """Rows that have each prompt once and the answers to it behind it, as far as that is less to compute.

        Args:
            inputs: of one answer a row, each [answers, tokens].
            prompts: of each answer, the number of its prompt.

        Returns:
            Inputs of rows, of each row the number of its prompt, and in which order the answers stand in the rows.
        """
        last, ecg_token_id = inputs["input_ids"][:, -logits_to_keep - 1], self.model.config.ecg_token_id
        # each answer has the last token of its prompt before it; an ECG stands in a row once
        if ecg_token_id is not None and last.eq(ecg_token_id).any():
            return inputs, prompts, [*range(len(prompts))]
        mask = inputs["attention_mask"]
        lengths, before = mask.sum(1).tolist(), mask[:, :-logits_to_keep].sum(1).tolist()
        # attention to all of a longer row takes its time, and one as wide as a window shares nothing
        limit = min(max(ROW_TOKENS, 2 * max(lengths)), self._tokens_to_share - 1)
        rows: list[list[int]] = []
        begins: list[int] = []
        for number in dict.fromkeys(prompts):
            group = [place for place, prompt in enumerate(prompts) if prompt == number]
            begin = before[group[0]] - 1  # the last token of the prompt predicts the first one of each answer
            shared = shared_rows([lengths[place] for place in group], limit, begin)
            rows += [[group[place] for place in row] for row in shared]
            begins += [begin] * len(shared)
        width = packed_width(lengths, rows, begins)
        if width >= self._tokens_to_share or len(rows) * width >= mask.numel():
            return inputs, prompts, [*range(len(prompts))]
        mask, ids, labels = flush_left(mask, inputs["input_ids"], inputs["labels"])
        chats = {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
        packed = pack(chats, rows, [0] * len(prompts), [*chats], self._tokenizer.pad_token_id, begins=begins)
        packed["attention_mask"] = mask_of(packed["position_ids"], self.model)
        return (
            {**packed, "use_cache": False},
            [prompts[row[0]] for row in rows],
            [place for row in rows for place in row],
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """As TRL's, in which groups with equal rewards are no part of what is divided by.

        The loss of an answer is in proportion to its advantage and --beta; the two are made larger by the share that is left out.
        """
        factor, beta = inputs.get("row_factor", 1.0), self.beta
        self.beta = beta * float(factor)
        try:
            return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * factor})
        finally:
            self.beta = beta

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, which calls what is measured under all conditions alike."""
        for condition in CONDITIONS:
            if any(name.startswith(f"eval_{condition}_") for name in logs):
                self._metrics["eval"] = defaultdict(
                    list, {f"{condition}_{name}": values for name, values in self._metrics["eval"].items()}
                )
        super().log(logs, start_time)

    def _draw(self, advantages: torch.Tensor, own: slice) -> None:
        """Draws the first answers of this process, if it is the first one, to a page."""
        step = self.state.global_step
        if not (self.draw_steps and self.answers_dir and self.is_world_process_zero()):
            return
        # answers are not written at every step: of each `draw_steps` the first ones are drawn
        if step % self.draw_steps * self.args.gradient_accumulation_steps >= self.generate_every:
            return
        rewards = self._rewards[own].tolist()
        shown: dict[int, Answers] = {}
        for place, number in enumerate(self._numbers):
            group = shown.setdefault(number, Answers(self.prompts["train"].row(number), []))
            values = dict(zip(self.reward_func_names, rewards[place], strict=True))
            group.answers.append((self._texts[place], values, float(advantages[place])))
        ecgs = self.prompts["train"].collator.ecgs_of_row
        groups = list(shown.items())[: self.draw_prompts]
        drawn = [(ecgs(dict(self.prompts["train"].data[number])), group) for number, group in groups]
        draw_answers(self.answers_dir / f"step-{step:06d}.html", step, drawn)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As of `WholeCheckpoints`, with how far the run is and what was counted."""
        states: Any = self.state.stateful_callbacks  # a dict, whatever its annotation says
        states[type(self).__name__] = {"step": self._step, "groups": self.groups, "evaluated": self.evaluated}
        super()._save_checkpoint(model, trial)

    def _load_callback_state(self) -> None:
        """What was counted goes on."""
        states: Any = self.state.stateful_callbacks
        state = states.pop(type(self).__name__, None)
        if state is not None:
            self._step, self.groups, self.evaluated = state["step"], state["groups"], state["evaluated"]
        super()._load_callback_state()

    def _answers_file(self, folder: str) -> Path:
        return Path(folder) / f"answers_{self.accelerator.process_index}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        """As the trainer's, with the answers that are trained on, where some are still to be."""
        super()._save_rng_state(output_dir)
        if self._step % self.generate_every and self._buffered_inputs is not None:
            tensors = {
                f"{place}.{name}": value.contiguous().clone()  # the same number stands in all batches
                for place, batch in enumerate(self._buffered_inputs)
                for name, value in batch.items()
                if value is not None
            }
            with atomic_path(self._answers_file(output_dir)) as path:
                save_file(tensors, path)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the trainer's, with the answers that are trained on.

        Raises:
            ValueError: they are not there.
        """
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self._step % self.generate_every:
            return
        path = self._answers_file(checkpoint)
        if not path.is_file():
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: it lacks {path.name}, the answers that were being trained on. Go on from another "
                "checkpoint."
            )
        batches: list[dict[str, Any]] = [{} for _ in range(self.args.steps_per_generation)]
        for key, value in load_file(path, device=str(self.accelerator.device)).items():
            place, _, name = key.partition(".")
            batches[int(place)][name] = value
        self._buffered_inputs = batches


def _equal_groups(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """Whether all answers of a group have the same rewards: [groups], of rewards [answers, any number]."""
    grouped = rewards.unflatten(0, (-1, group))
    return (grouped.amax(1) - grouped.amin(1) <= EQUAL).all(1)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Answers are written without dropout, and with the statistics of batch norm."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
