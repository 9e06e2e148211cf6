"""ES: evolution strategies on all parameters of a language model, with verifiable rewards and forward passes only.

Qiu et al. 2025, "Evolution Strategies at Scale", arXiv:2509.24372, algorithm 2, after Salimans et al. 2017,
arXiv:1703.03864. In each step (iteration in the papers), each of N population members perturbs the weights theta
and answers the same prompts greedily. Its mean reward R_n measures how much its noise helps:

    R_n   = mean reward of the model with weights theta + noise_scale * noise_n       noise_n ~ N(0, I)
    z_n   = (R_n - mean(R)) / std(R)
    theta = theta + learning_rate / N * sum_n z_n noise_n

`perturbation: gaussian` is the paper's method, one member after another. With `perturbation: low_rank` (Sarkar et al.
2025, "EGGROLL", arXiv:2511.16652), the noise of a matrix is A B^T / sqrt(rank), and `population_batch` members decode
in one batch: each row passes through W as usual, and also through A and B of its own member.

Departures from the papers:
- theta is kept in fp32, and the model's weights are rounded from it: for each member with `gaussian`, once per step
  with `low_rank`. The published code adds noise to bf16 weights in place and subtracts it again, which does not restore
  them exactly, and adds updates to bf16 weights, which loses small ones.
- Each member draws its noise from one random stream over all parameters. The published code restarts the stream at
  every tensor, so that layers of the same shape get the same noise.
- If all members have the same reward, the update is exactly zero.
- In bf16, `low_rank` decodes with A and B rounded to bf16; the update uses the unrounded factors.
- `antithetic` (Salimans et al.) pairs each noise with its negative. Every step draws new prompts.

Both modes perturb linear weights, embeddings (once if the head is tied), biases and norm weights.

    python es_train.py
    python es_train.py --config recipes/es_gsm8k_gaussian.yml
    python es_train.py perturbation=gaussian antithetic=true
    accelerate launch --num_processes 2 es_train.py      (on a CPU: torchrun --nproc_per_node 2 es_train.py)

Where to make changes: the fitness of members in `z_scores`; the distribution of the noise in `draw`; its structure in
`noise_shapes`, `weighted_noise` and `Population`; the update in `update_master`; metrics and the loop in `train`.
Elsewhere: decoding (generation.py), rewards (reward.py), checkpoints and logs (runs.py).

Shapes: N members, M of them in a batch, K noises (N, or N / 2 with antithetic pairs), P prompts, r rank.
"""

import functools
import math
import signal
from typing import Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C while imports and loading take their time

import torch
from peft import PeftModel
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

import utils
from generation import generate
from reward import UserError
from runs import Run, check_folder, run_identity
from utils import draw_problems, gather_scores, non_finite, schedule_factor, score_completions, share

# --- Config: es_config.yml documents each key -------------------------------------------------------------------------


class ESConfig(utils.RunConfig):
    # Population
    num_steps: NonNegativeInt = 60
    prompts_per_step: PositiveInt = 16
    population_size: int = Field(32, ge=2)  # z-scores compare members
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
    log_dir: utils.UserPath = "es_logs"

    @model_validator(mode="after")
    def pairs_are_whole(self):
        if self.antithetic and self.population_size % 2:
            raise ValueError(f"population_size: {self.population_size}: should be even: antithetic members form pairs")
        return self

    @property
    def num_noises(self):
        return self.population_size // 2 if self.antithetic else self.population_size


# --- The math ---------------------------------------------------------------------------------------------------------


def z_scores(rewards):
    """Return z-scores (std over N) of the members' mean rewards, (N,), float64. Raise ValueError if not finite.

    Equal rewards give exactly 0. Compare them instead of adding an epsilon: rounding can leave a tiny nonzero std, and
    thus large scores.
    """
    rewards = rewards.double()
    if not rewards.isfinite().all():
        raise ValueError(f"rewards must be finite: {rewards}")
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def noise_of_member(member, antithetic):
    """Return the index of a member's noise among the K noises, and its sign."""
    return (member // 2, 1 - 2 * (member % 2)) if antithetic else (member, 1)


def noise_shapes(parameters, perturbation, rank):
    """Return the shape of the noise to draw for each of {name: parameter}.

    It is the parameter's own shape, except for a matrix (out, in) with low_rank: (out + in, r), which stacks the
    factors A (out, r) and B (in, r).
    """
    return {
        name: (sum(p.shape), rank) if perturbation == "low_rank" and p.ndim == 2 else tuple(p.shape)
        for name, p in parameters.items()
    }


def noise_generators(seed, step, noises, num_noises, device):
    """Return a generator for each of the given noises of a step. Each draws all parameters, in order."""
    return [utils.seeded_generator(seed, "noise", step * num_noises + noise, device) for noise in noises]


def draw(shape, generator):
    """Draw noise, or a factor of it, with mean 0 and variance 1."""
    return torch.randn(shape, generator=generator, device=generator.device)


def weighted_noise(weight, shape, generators, coefficients):
    """Return sum_k coefficients_k noise_k of one parameter, in fp32. generators: K, positioned at this parameter"""
    if shape == tuple(weight.shape):  # never the shape of factors, since out + in > out
        total = torch.zeros_like(weight)
        for generator, coefficient in zip(generators, coefficients, strict=True):
            total.add_(draw(shape, generator), alpha=coefficient)
        return total
    factors = torch.stack([draw(shape, generator) for generator in generators])  # (K, out + in, r)
    A, B = factors.split(list(weight.shape), dim=1)
    A = A * torch.tensor(coefficients, device=A.device, dtype=A.dtype)[:, None, None]
    return torch.einsum("kor,kir->oi", A, B) / math.sqrt(shape[1])  # one matrix product over all K * r columns


def update_master(master, shapes, generators, z, learning_rate, antithetic):
    """Add learning_rate / N * sum_n z_n noise_n to theta, in fp32 and in place. master: {name: tensor}; z: N floats"""
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
    """Copy the master weights into the model, rounded once."""
    for name, parameter in model.named_parameters():
        parameter.copy_(master[name])


@torch.no_grad()
def write_member(model, master, noise_scale, generator):
    """Write master + noise_scale * noise into the model, rounded once. A tied parameter is written once."""
    for name, parameter in model.named_parameters():
        parameter.copy_(master[name] + noise_scale * draw(parameter.shape, generator))


def check_low_rank(model, rank):
    """Raise UserError if Population has no hook for a module with parameters, or if the rank exceeds a matrix's."""
    for path, module in model.named_modules():
        kind, has_weights = type(module).__name__, any(True for _ in module.parameters(recurse=False))
        # Match exact types, since a subclass may do more, except for Gemma's embedding: the hook scales as it does.
        is_scaled = isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
        is_known = type(module) in (nn.Linear, nn.Embedding) or is_scaled or kind.endswith("RMSNorm")
        if has_weights and not is_known:
            raise UserError(f"perturbation: low_rank cannot perturb {path}, a {kind}; gaussian can")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and rank > min(parameter.shape):
            raise UserError(f"rank: {rank}: exceeds the rank of {name}, {tuple(parameter.shape)}")


def add_product(y, h, A):
    """Add h A to y in place, for each of G groups. y: (G, n, out), h: (G, n, r), A: (G, r, out)"""
    if h.shape[-1] == 1:  # many times faster than a batched matrix product with an inner dimension of 1
        y.addcmul_(h, A)
    else:
        y.baddbmm_(h, A)


class Population:
    """M members in one batch: inside `with`, the model computes each row with the weights of its own member.

    No weight is overwritten. Forward hooks add the contribution of the noise:

        Linear      (x B) A^T + b                 A B^T: the noise of the weight, b: that of the bias
        Embedding   A[id] B^T, times embed_scale  a tied head has the same A and B
        RMSNorm     its weight is replaced by one per row, and restored afterwards
    """

    def __init__(self, model, shapes, generators, scales, rows_per_member, memory):
        """Draw the noise of M members. Rows are ordered by member, `rows_per_member` each.

        shapes: see noise_shapes; generators: M, one per member; scales: (M,) noise scale times the member's sign
        memory: a DecodeMemory, in which the noise has the same addresses in every step, for CUDA graphs
        """
        self.model, self.rows_per_member = model, rows_per_member
        self.keep = functools.partial(memory.keep, device=model.device)
        self.num_rows, self.handles, self.norms = len(generators) * rows_per_member, [], {}
        self.noise = {}  # by parameter, scaled: A^T (M, r, out) and B (M, in, r) of a matrix, (M, d) of a vector
        for name, parameter in model.named_parameters():
            noise = torch.stack([draw(shapes[name], generator) for generator in generators])
            if parameter.ndim == 2:
                A, B = noise.split(list(parameter.shape), dim=1)
                A = A * (scales / math.sqrt(shapes[name][1]))[:, None, None]
                A, B = A.transpose(1, 2).to(parameter.dtype), B.to(parameter.dtype)
                self.noise[parameter] = self.keep((name, "A"), A), self.keep((name, "B"), B)
            else:
                self.noise[parameter] = self.keep(name, noise * scales[:, None])

    def __enter__(self):
        """Register the hooks. Return the `on_rows` callback for `generate`."""
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                self.handles.append(module.register_forward_hook(self._add_to_linear))
            elif isinstance(module, nn.Embedding):
                self.handles.append(module.register_forward_hook(self._add_to_embedding))
            elif list(module.parameters(recurse=False)):
                self.norms[module] = path, module.weight
                self.handles.append(module.register_forward_pre_hook(self._exchange_norm_weight))
        return self._select

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        for module, (_, weight) in self.norms.items():
            module.weight = weight

    def _select(self, rows):
        """Gather the noise of each row in the batch, once and not in every step. rows: (R,)"""
        self.members, self.of_rows = self.keep("members", rows // self.rows_per_member), {}  # (R,)
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 2:
                A, B = self.noise[parameter]
                self.of_rows[parameter] = self._gather((name, "A rows"), A), self._gather((name, "B rows"), B)
            elif name.endswith("bias"):
                self.of_rows[parameter] = self._gather((name, "rows"), self.noise[parameter])
        for module, (path, weight) in self.norms.items():
            weights = (weight + self.noise[weight][self.members]).to(weight.dtype)  # (R, d)
            self.of_rows[module] = self.keep((path, "rows"), weights, self.num_rows)

    def _gather(self, key, noise):
        """Return noise (M, ...) unchanged if the batch has all rows of all members, else one entry per row (R, ...)."""
        if len(self.members) == self.num_rows:
            return noise
        return self.keep(key, noise[self.members], self.num_rows // 2 + 1)

    def _add_to_linear(self, module, inputs, output):
        A, B = self.of_rows[module.weight]  # (M or R, r, out), (M or R, in, r)
        y = output.view(A.shape[0], -1, A.shape[2])
        add_product(y, inputs[0].reshape(B.shape[0], -1, B.shape[1]).bmm(B), A)
        if module.bias is not None:
            y += self.of_rows[module.bias][:, None]

    def _add_to_embedding(self, module, inputs, output):
        B = self.of_rows[module.weight][1].transpose(1, 2)  # (M or R, r, D)
        if hasattr(module, "embed_scale"):  # Gemma's, rounded as in the module
            B = B * torch.as_tensor(module.embed_scale).to(B.dtype)
        A = self.noise[module.weight][0].transpose(1, 2)[self.members[:, None], inputs[0]]  # (R, T, r)
        add_product(output.view(B.shape[0], -1, B.shape[2]), A.view(B.shape[0], -1, B.shape[1]), B)

    def _exchange_norm_weight(self, module, inputs):
        weights = self.of_rows[module]
        weights = weights.view(len(weights), *[1] * (inputs[0].ndim - 2), -1)
        module.weight = nn.Parameter(weights, requires_grad=False)


# --- Rollout and update -----------------------------------------------------------------------------------------------


def rollout(setup, master, shapes, problems, members, noise_scale, step, config):
    """Complete all problems greedily with each of the given members. Rows are ordered by member.

    low_rank decodes all members in one batch. gaussian takes a single member and leaves its weights in the model.
    """
    prompts, device = [problem.ids for problem in problems], setup.model.device
    noises, signs = zip(*(noise_of_member(member, config.antithetic) for member in members), strict=True)
    generators = noise_generators(config.seed, step, noises, config.num_noises, device)
    if config.perturbation == "gaussian":
        write_member(setup.model, master, noise_scale * signs[0], generators[0])
        return generate(setup.model, prompts, setup.settings)
    scales = noise_scale * torch.tensor(signs, device=device)
    more = len(prompts), setup.settings.memory
    with Population(setup.model, shapes, generators, scales, *more) as on_rows:
        return generate(setup.model, prompts * len(members), setup.settings, on_rows=on_rows, block_size=len(prompts))


def update(master, shapes, step, z, learning_rate, config):
    """Update the master weights for one step, in training and when the journal is replayed.

    It must depend only on the config and on what the journal records. If all z are 0, it changes nothing.
    """
    if any(z):
        K, device = config.num_noises, next(iter(master.values())).device
        generators = noise_generators(config.seed, step, range(K), K, device)
        update_master(master, shapes, generators, z, learning_rate, config.antithetic)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def save_progress(path, setup, master):
    """Write the master weights as a Hugging Face folder."""
    utils.save_model(setup.model, setup.tokenizer, path / "model", master)


@torch.no_grad()
def load_progress(path, states, setup, master, shapes, config):
    """Restore the weights that `save_progress` wrote, then replay the updates of `states`, bit for bit.

    path: None to start from the base model's weights; states: the journal's lines after that checkpoint
    """
    if path:
        utils.load_weights(path / "model", master)
    for state in states:  # state["step"] counts finished steps, and `run.steps` starts at 0
        update(master, shapes, state["step"] - 1, state["z"], state["learning_rate"], config)
    write_weights(setup.model, master)


# --- Training ---------------------------------------------------------------------------------------------------------


def train(config, setup, run, master, shapes):
    """Run the paper's algorithm. master: {name: fp32 tensor}, theta; shapes: see `noise_shapes`"""
    model, accelerator = setup.model, setup.accelerator
    N, P = config.population_size, config.prompts_per_step
    members = range(N)[share(N, accelerator)]  # the members of this process
    members_at_once = config.population_batch if config.perturbation == "low_rank" else 1
    for step in run.steps():
        noise_scale = config.noise_scale * schedule_factor(config.noise_schedule, step, config.num_steps)
        learning_rate = config.learning_rate * schedule_factor(config.lr_schedule, step, config.num_steps)

        # 1. Draw P prompts, the same for all members.
        problems = draw_problems(setup.train_set, run.state["prompts"], P, config.seed)

        # 2. Perturb the weights N times. Every member answers the prompts, and its completions are scored.
        rows = []
        for first in range(0, len(members), members_at_once):
            batch = members[first : first + members_at_once]
            with run.phase("rollout"):
                completions = rollout(setup, master, shapes, problems, batch, noise_scale, step, config)
            with run.phase("reward"):
                rows += score_completions(config.rewards, completions, setup, problems * len(batch))
        scores = gather_scores(rows, accelerator.device)  # of all processes, ordered by member: {name: (N * P,)}
        skipped = non_finite(scores)  # the reason to skip the update, or None

        # 3. Compute z-scores of the members' mean rewards R_n.
        rewards = scores["reward"].view(N, P).double().mean(dim=1)  # (N,)
        z = torch.zeros(N) if skipped else z_scores(rewards)

        # 4. Update the fp32 master weights. Copying them to the model also removes the last member's noise.
        with run.phase("update"):
            update(master, shapes, step, z.tolist(), learning_rate, config)
            write_weights(model, master)

        # 5. Log.
        ties = (rewards[:, None] == rewards).double().fill_diagonal_(0)  # (N, N)
        metrics = {
            **{f"es/reward_{how}": getattr(rewards, how)() for how in ("min", "mean", "max")},
            "es/reward_std": rewards.std(correction=0),
            "es/tie_rate": ties.sum() / (N * (N - 1)),
            "es/noise_scale": noise_scale,
            "optim/learning_rate": learning_rate,
        }
        # `load_progress` replays the update from z and learning_rate.
        record = {"z": z.tolist(), "learning_rate": learning_rate, "noise_scale": noise_scale}
        record["rewards"] = None if skipped else rewards.tolist()
        run.log(step, scores, metrics, skipped, num_prompts=P, signal_share=float(1 - metrics["es/tie_rate"]), **record)


def main(config):
    check_folder(config)
    N, P = config.population_size, config.prompts_per_step
    setup = utils.set_up(config, config.dtype, batch_size=config.population_batch * P)
    share(N, setup.accelerator)  # raises if there are fewer members than processes
    if isinstance(setup.model, PeftModel):
        setup.model = setup.model.merge_and_unload()
    model = setup.model.requires_grad_(False)
    if config.perturbation == "low_rank":
        check_low_rank(model, config.rank)
    parameters = dict(model.named_parameters())  # a tied parameter once
    master = {name: parameter.float().clone() for name, parameter in parameters.items()}
    shapes = noise_shapes(parameters, config.perturbation, config.rank)
    device = {"kind of device": setup.accelerator.device.type}  # CPUs and GPUs draw different noise
    run = Run(
        config,
        setup,
        run_identity(config, setup) | device,
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
