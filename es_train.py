"""ES: evolution strategies on all parameters of a language model, with verifiable rewards. Forward passes only.

Qiu et al. 2025, "Evolution Strategies at Scale", arXiv:2509.24372, algorithm 2, after Salimans et al. 2017,
arXiv:1703.03864. Every step perturbs the weights theta in N ways. Each member of this population answers the same
prompts greedily; its mean reward R_n says how good its noise is:

    R_n   = mean reward of the model with weights theta + noise_scale * noise_n       noise_n ~ N(0, 1)
    z_n   = (R_n - mean(R)) / std(R)
    theta = theta + learning_rate / N * sum_n z_n noise_n

`perturbation: gaussian` is the paper's: one member after another. `perturbation: low_rank` (Sarkar et al. 2025,
"EGGROLL", arXiv:2511.16652) makes the noise of a matrix A B^T / sqrt(rank), so that all members decode in one batch:
each row passes through W as usual, and then through A and B of its own member.

Departures from the papers:
- theta is kept in fp32, and the model's weights are rounded from it: with `gaussian` for each member anew, with
  `low_rank` once per step. The published code adds noise to bf16 weights in place and subtracts it again, which leaves
  different weights, and adds updates to bf16 weights, which loses small ones.
- Each member's noise is one stream of random numbers over all parameters. The published code restarts the stream at
  every tensor, so that layers of one shape get the same noise.
- Members of equal reward change nothing, exactly.
- In bf16, `low_rank` decodes with A and B rounded to bf16; the update uses the unrounded ones.
- `antithetic` (Salimans et al.) pairs each noise with its negative. Prompts are drawn anew in every step.

Both modes perturb linear weights, embeddings (with a tied head, once), biases and norm weights.

    python es_train.py
    python es_train.py --config recipes/es_gsm8k_gaussian.yml
    python es_train.py perturbation=gaussian antithetic=true
    accelerate launch --num_processes 2 es_train.py      (on a CPU: torchrun --nproc_per_node 2 es_train.py)

Where to change what: the fitness of a member, `z_scores`; the distribution of the noise, `draw`; its form in a matrix,
`noise_shapes`, `weighted_noise`, `Population`; the update, `update_master`; a metric, `metrics` in `train`; the loop,
`train`. Not here: decoding (generation.py), rewards (reward.py), checkpoints and logs (runs.py).

Letters in shapes: N members, M of them in a batch, K noises (N, or N / 2 in antithetic pairs), P prompts, r rank.
"""

import math
from typing import Literal

import torch
from peft import PeftModel
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import nn

import utils
from generation import generate
from reward import UserError
from runs import Run, run_identity
from utils import draw_problems, gather_scores, non_finite, schedule_factor, score_completions, share

# --- Config: es_config.yml says what each key means -------------------------------------------------------------------


class ESConfig(utils.RunConfig):
    # Population
    num_iterations: PositiveInt = 60
    prompts_per_iteration: PositiveInt = 16
    population_size: int = Field(32, ge=2)  # a member is good or bad only in comparison
    perturbation: Literal["low_rank", "gaussian"] = "low_rank"
    rank: PositiveInt = 1
    antithetic: bool = False
    noise_scale: PositiveFloat = 0.01
    noise_schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Update
    learning_rate: PositiveFloat = 6e-3
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Memory and speed
    population_batch: PositiveInt = 32
    # Evaluation and logs
    eval_every: PositiveInt = 10
    log_dir: str = "es_logs"

    @model_validator(mode="after")
    def pairs_are_whole(self):
        if self.antithetic and self.population_size % 2:
            raise ValueError(f"population_size: {self.population_size}: should be even: antithetic members are pairs")
        return self

    @property
    def num_noises(self):
        return self.population_size // 2 if self.antithetic else self.population_size


# --- The math ---------------------------------------------------------------------------------------------------------


def z_scores(rewards):
    """z-scores (std over n) of the members' mean rewards, (N,), float64. ValueError for a reward that is not finite.

    Equal rewards give exactly 0. Compare them instead of adding an epsilon: rounding can leave a tiny nonzero std, and
    so large scores.
    """
    rewards = rewards.double()
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite: {rewards}")
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def noise_of_member(member, antithetic):
    """The index of the member's noise among the K noises, and its sign."""
    return (member // 2, 1 - 2 * (member % 2)) if antithetic else (member, 1)


def noise_shapes(parameters, perturbation, rank):
    """The shape of the random numbers drawn for each of {name: parameter}: its own; for a matrix (out, in) under
    "low_rank" that of A (out, r) and B (in, r), stacked."""
    return {
        name: (sum(p.shape), rank) if perturbation == "low_rank" and p.ndim == 2 else tuple(p.shape)
        for name, p in parameters.items()
    }


def noise_generators(seed, iteration, noises, num_noises, device):
    """The streams that some of an iteration's K noises, by their numbers, are drawn from, parameter after parameter."""
    return [utils.seeded_generator(seed, "noise", iteration * num_noises + noise, device) for noise in noises]


def draw(shape, generator):
    """The noise, or one factor of it: mean 0, variance 1."""
    return torch.randn(shape, generator=generator, device=generator.device)


def weighted_noise(weight, shape, generators, coefficients):
    """sum_k coefficients_k noise_k of one parameter, fp32. generators: K, at this parameter; coefficients: K floats."""
    if shape == tuple(weight.shape):  # never that of factors, as out + in is more than out
        total = torch.zeros_like(weight)
        for generator, coefficient in zip(generators, coefficients, strict=True):
            total.add_(draw(shape, generator), alpha=coefficient)
        return total
    factors = torch.stack([draw(shape, generator) for generator in generators])  # (K, out + in, r)
    A, B = factors.split(list(weight.shape), dim=1)
    A = A * torch.tensor(coefficients, device=A.device, dtype=A.dtype)[:, None, None]
    return torch.einsum("kor,kir->oi", A, B) / math.sqrt(shape[1])  # one matrix product over all K * r columns


def update_master(master, shapes, generators, z, learning_rate, antithetic):
    """theta + learning_rate / N * sum_n z_n noise_n, in fp32 and in place. master: {name: tensor}; z: N floats."""
    coefficients = [0.0] * len(generators)
    for member, z_n in enumerate(z):
        noise, sign = noise_of_member(member, antithetic)
        coefficients[noise] += sign * z_n
    for name, weight in master.items():
        total = weighted_noise(weight, shapes[name], generators, coefficients)
        weight.add_(total, alpha=learning_rate / len(z))


# --- The population ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_weights(model, master):
    """The model's weights as the master's, rounded once."""
    for name, parameter in model.named_parameters():
        parameter.copy_(master[name])


@torch.no_grad()
def write_member(model, master, noise_scale, generator):
    """The model's weights as master + noise_scale * noise, rounded once. A shared (tied) parameter is written once."""
    for name, parameter in model.named_parameters():
        parameter.copy_(master[name] + noise_scale * draw(parameter.shape, generator))


def check_low_rank(model, rank):
    """UserError if Population has no hook for a module with parameters, or if a matrix is smaller than the rank."""
    for path, module in model.named_modules():
        kind, has_weights = type(module).__name__, any(True for _ in module.parameters(recurse=False))
        # A subclass may do more than its parent: Gemma's embedding scales what it looks up.
        if has_weights and type(module) not in (nn.Linear, nn.Embedding) and not kind.endswith("RMSNorm"):
            raise UserError(f"perturbation: low_rank cannot perturb {path}, a {kind}; gaussian can")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and rank > min(parameter.shape):
            raise UserError(f"rank: {rank} is more than {name}, {tuple(parameter.shape)}, can have")


def add_product(y, h, A):
    """y += h A in place, for each of G groups; y: (G, n, out), h: (G, n, r), A: (G, r, out)"""
    if h.shape[-1] == 1:  # many times faster than a batch of matrix products of length 1
        y.addcmul_(h, A)
    else:
        y.baddbmm_(h, A)


class Population:
    """M members in one batch: inside `with`, a row is computed with the weights of the member that it belongs to.

    Nothing is written to the model's weights. Hooks on its modules add what the noise contributes:

        Linear      (x B) A^T + b                 A B^T: the noise of the weight, b: that of the bias
        Embedding   A[id] B^T                     a tied head has the same A and B
        RMSNorm     its weight is exchanged for one a row, and put back
    """

    def __init__(self, model, shapes, generators, scales, rows_per_member):
        """shapes: see noise_shapes; generators: M, of the members' noise; scales: (M,) noise scale with member's sign

        Rows come member after member, `rows_per_member` each.
        """
        self.model, self.num_members, self.rows_per_member = model, len(generators), rows_per_member
        self.handles, self.norms = [], {}
        self.noise = {}  # by parameter, scaled: A^T (M, r, out) and B (M, in, r) of a matrix, (M, d) of a vector
        for name, parameter in model.named_parameters():
            noise = torch.stack([draw(shapes[name], generator) for generator in generators])
            if parameter.ndim == 2:
                A, B = noise.split(list(parameter.shape), dim=1)
                A = A * (scales / math.sqrt(shapes[name][1]))[:, None, None]
                self.noise[parameter] = (
                    A.transpose(1, 2).to(parameter.dtype).contiguous(),
                    B.to(parameter.dtype).contiguous(),
                )
            else:
                self.noise[parameter] = noise * scales[:, None]

    def __enter__(self):
        """Returns what `generate` is to call with the rows of its batch."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                self.handles.append(module.register_forward_hook(self._add_to_linear))
            elif isinstance(module, nn.Embedding):
                self.handles.append(module.register_forward_hook(self._add_to_embedding))
            elif list(module.parameters(recurse=False)):
                self.norms[module] = module.weight
                self.handles.append(module.register_forward_pre_hook(self._exchange_norm_weight))
        return self._select

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        for module, weight in self.norms.items():
            module.weight = weight
        self.noise, self.selected = {}, {}  # memory that the update and the next population have a use for

    def _select(self, rows):
        self.members = rows // self.rows_per_member  # (R,) the member of each row in the batch
        self.selected = {}  # by module: its noise for these rows, gathered once and not at every step

    def _of_rows(self, noise):
        """(M, ...) as it is while every member has all its rows, so that they are M blocks; after that (R, ...)."""
        return noise if len(self.members) == self.num_members * self.rows_per_member else noise[self.members]

    def _add_to_linear(self, module, inputs, output):
        if module not in self.selected:
            A, B = map(self._of_rows, self.noise[module.weight])
            b = None if module.bias is None else self._of_rows(self.noise[module.bias])[:, None]
            self.selected[module] = A, B, b
        A, B, b = self.selected[module]
        y = output.view(A.shape[0], -1, A.shape[2])
        add_product(y, inputs[0].reshape(B.shape[0], -1, B.shape[1]).bmm(B), A)
        if b is not None:
            y += b

    def _add_to_embedding(self, module, inputs, output):
        if module not in self.selected:
            self.selected[module] = self._of_rows(self.noise[module.weight][1]).transpose(1, 2)
        B = self.selected[module]  # (M or R, r, D)
        A = self.noise[module.weight][0].transpose(1, 2)[self.members[:, None], inputs[0]]  # (R, T, r)
        add_product(output.view(B.shape[0], -1, B.shape[2]), A.view(B.shape[0], -1, B.shape[1]), B)

    def _exchange_norm_weight(self, module, inputs):
        if module not in self.selected:
            weight = self.norms[module]
            weights = (weight + self.noise[weight][self.members]).to(weight.dtype)  # (R, d)
            weights = weights.view(len(weights), *[1] * (inputs[0].ndim - 2), -1)
            module.weight = self.selected[module] = nn.Parameter(weights, requires_grad=False)


# --- Rollout and update -----------------------------------------------------------------------------------------------


def rollout(setup, master, shapes, problems, members, noise_scale, step, config):
    """Greedy completions of all problems by each of some members, member after member.

    All in one batch with low_rank. With gaussian, `members` is one member, and the model has its weights afterwards.
    """
    prompts, device = [problem.ids for problem in problems], setup.model.device
    noises, signs = zip(*(noise_of_member(member, config.antithetic) for member in members), strict=True)
    generators = noise_generators(config.seed, step, noises, config.num_noises, device)
    if config.perturbation == "gaussian":
        write_member(setup.model, master, noise_scale * signs[0], generators[0])
        return generate(setup.model, prompts, setup.settings)
    scales = noise_scale * torch.tensor(signs, device=device)
    with Population(setup.model, shapes, generators, scales, len(prompts)) as on_rows:
        return generate(setup.model, prompts * len(members), setup.settings, on_rows=on_rows, block_size=len(prompts))


def update(master, shapes, step, z, learning_rate, config):
    """The update of one step, in the master: made in training, and again when the journal is replayed. So it may depend
    on nothing that the journal does not have. If all z are 0, it changes no bit."""
    if any(z):
        K, device = config.num_noises, next(iter(master.values())).device
        generators = noise_generators(config.seed, step, range(K), K, device)
        update_master(master, shapes, generators, z, learning_rate, config.antithetic)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def save_progress(path, setup, master):
    """Write a checkpoint's files: the master weights as a Hugging Face folder."""
    utils.save_model(setup.model, setup.tokenizer, path / "model", master)


@torch.no_grad()
def load_progress(path, states, setup, master, shapes, config):
    """Restore what `save_progress` wrote, or without a `path` start from the base model; then repeat the updates of
    `states`, the journal's lines after it: the same weights, bit for bit."""
    if path:
        utils.load_weights(path / "model", master)
    for state in states:  # state["step"] steps are done: the last one was step - 1, as `run.steps` counts
        update(master, shapes, state["step"] - 1, state["z"], state["learning_rate"], config)
    write_weights(setup.model, master)


# --- Training ---------------------------------------------------------------------------------------------------------


def train(config, setup, run, master, shapes):
    """Run the algorithm of the paper. master: {name: fp32 tensor}, theta; shapes: see `noise_shapes`"""
    model, tokenizer, accelerator = setup.model, setup.tokenizer, setup.accelerator
    N, P = config.population_size, config.prompts_per_iteration
    members = range(N)[share(N, accelerator)]  # those of this process
    members_at_once = config.population_batch if config.perturbation == "low_rank" else 1
    for step in run.steps():
        noise_scale = config.noise_scale * schedule_factor(config.noise_schedule, step, config.num_iterations)
        learning_rate = config.learning_rate * schedule_factor(config.lr_schedule, step, config.num_iterations)

        # 1. Draw P prompts, the same for all members.
        problems = draw_problems(setup.train_set, step, P, config.seed)

        # 2. Perturb the weights N ways. Every member answers the prompts, and its completions are scored.
        rows = []
        for first in range(0, len(members), members_at_once):
            batch = members[first : first + members_at_once]
            with run.phase("rollout"):
                completions = rollout(setup, master, shapes, problems, batch, noise_scale, step, config)
            with run.phase("reward"):
                rows += score_completions(config.rewards, completions, tokenizer, problems * len(batch))
        scores = gather_scores(rows, accelerator.device)  # of all processes, member after member: {name: (N * P,)}
        skipped = non_finite(scores)  # why this step makes no update, or None

        # 3. z-scores of the members' mean rewards R_n.
        rewards = scores["reward"].view(N, P).double().mean(dim=1)  # (N,)
        z = torch.zeros(N) if skipped else z_scores(rewards)

        # 4. Update the fp32 master. Writing the model's weights from it also undoes the last member's noise.
        with run.phase("update"):
            update(master, shapes, step, z.tolist(), learning_rate, config)
            write_weights(model, master)

        # 5. Log.
        ties = (rewards[:, None] == rewards).double().fill_diagonal_(0)  # (N, N)
        metrics = {
            "es/reward_min": rewards.min(),
            "es/reward_mean": rewards.mean(),
            "es/reward_max": rewards.max(),
            "es/reward_std": rewards.std(correction=0),
            "es/tie_rate": ties.sum() / (N * (N - 1)),
            "es/noise_scale": noise_scale,
            "optim/learning_rate": learning_rate,
            "progress/prompts": (step + 1) * P,
        }
        # `load_progress` repeats the update from z and learning_rate.
        record = {"z": z.tolist(), "learning_rate": learning_rate, "noise_scale": noise_scale}
        record["rewards"] = None if skipped else rewards.tolist()
        run.log(step, scores, metrics, skipped, no_signal=metrics["es/tie_rate"] == 1, **record)


def main(config):
    N, P = config.population_size, config.prompts_per_iteration
    setup = utils.set_up(config, config.dtype, batch_size=config.population_batch * P)
    share(N, setup.accelerator)  # enough members for all processes
    if isinstance(setup.model, PeftModel):
        setup.model = setup.model.merge_and_unload()
    model = setup.model.requires_grad_(False)
    if config.perturbation == "low_rank":
        check_low_rank(model, config.rank)
    parameters = dict(model.named_parameters())  # a tied one once
    master = {name: parameter.float().clone() for name, parameter in parameters.items()}
    shapes = noise_shapes(parameters, config.perturbation, config.rank)
    device = {"kind of device": setup.accelerator.device.type}  # CPUs and GPUs draw different noise
    run = Run(
        config,
        setup,
        run_identity(config, setup) | device,
        num_steps=config.num_iterations,
        step_text=f"{N} members x {P} prompts = {N * P:,} completions, {config.perturbation} noise",
        weights=master,
        evaluate=lambda: utils.evaluate(setup),
        save=lambda path: save_progress(path, setup, master),
        load=lambda path, states: load_progress(path, states, setup, master, shapes, config),
        journal=True,
    )
    train(config, setup, run, master, shapes)


if __name__ == "__main__":
    utils.run_from_command_line(main, ESConfig, "es_config.yml")
