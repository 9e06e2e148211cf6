"""ES: evolution strategies on all parameters of a language model, with verifiable rewards. Forward passes only.

Qiu et al. 2025, "Evolution Strategies at Scale", arXiv:2509.24372, algorithm 2, after Salimans et al. 2017,
arXiv:1703.03864. In every iteration, perturb the weights theta in N ways. Each member of this population answers the
same prompts greedily; its mean reward R_n says how good its noise was:

    R_n   = mean reward of the model with weights theta + noise_scale * noise_n       noise_n ~ N(0, 1)
    z_n   = (R_n - mean(R)) / std(R)
    theta = theta + learning_rate / N * sum_n z_n noise_n

`perturbation: gaussian` is the paper's: member after member. `perturbation: low_rank` (Sarkar et al. 2025, "EGGROLL",
arXiv:2511.16652) makes the noise of a matrix A B^T / sqrt(rank), so that all members decode in one batch: a row of the
batch passes W once, as every row does, and then A and B of the member that it belongs to.

Where this departs from the papers:
- theta is kept in fp32, and the model's weights are made from it by rounding: with `gaussian` for each member anew,
  with `low_rank` once an iteration. The published code adds noise to bf16 weights in place and subtracts it again,
  which leaves other weights than it found, and adds updates to bf16 weights, which loses small ones.
- Each member's noise is one stream of random numbers over all parameters. The published code starts the stream anew at
  every tensor, so that layers of one shape get the same noise.
- Members whose rewards are all equal change nothing, exactly.
- In bf16, `low_rank` decodes with A and B rounded to bf16; the update is made of the unrounded ones.
- `antithetic` (Salimans et al.) pairs each noise with its negative; prompts are drawn anew in every iteration.
- What is perturbed in both modes: linear weights, embeddings (a tied head with them, once), biases, norm weights.

    python es_train.py
    python es_train.py --config recipes/es_gsm8k_gaussian.yml
    python es_train.py perturbation=gaussian antithetic=true
    accelerate launch --num_processes 2 es_train.py      (on a CPU: torchrun --nproc_per_node 2 es_train.py)

Letters in shapes: N members, M of them in a batch, K noises (N, or N / 2 in antithetic pairs), P prompts, r rank.
"""

import contextlib
import dataclasses
import functools
import math
import time
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from utils import (
    AppendedFile,
    HalvingSize,
    Logger,
    PhaseTimer,
    ProgressBar,
    check,
    check_processes_agree,
    check_prompt_lengths,
    check_same_run,
    check_skipped,
    completion_metrics,
    config_text,
    draw_indices,
    encode_prompts,
    evaluate,
    fingerprint,
    gather_scores,
    generate,
    load_model,
    load_problems,
    load_tokenizer,
    make_accelerator,
    newest_checkpoint,
    non_finite,
    open_run_folder,
    print_banner,
    print_summary,
    resume_command,
    run_folder,
    run_from_command_line,
    run_identity,
    save_checkpoint,
    say,
    schedule_factor,
    score_completions,
    seal,
    seed_libraries,
    seeded_generator,
    stop_ids,
    unseal,
    whole_folder,
    write_file,
    write_model,
)

# ----------------------------------------------------------------------------------------------------------------------
# Config: what each key means stands in es_config.yml
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ESConfig:
    # Model
    model: str = "tiny_model"
    cache_dir: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Task
    dataset: str = "math_expr"
    dataset_args: dict = dataclasses.field(default_factory=dict)
    system_prompt: str = "Think step by step in <think></think>, then answer in <answer></answer>."
    rewards: dict[str, float] = dataclasses.field(default_factory=lambda: {"accuracy": 1.0, "format": 0.1})
    # Population
    num_iterations: int = 60
    prompts_per_iteration: int = 16
    population_size: int = 32
    max_new_tokens: int = 96
    perturbation: Literal["low_rank", "gaussian"] = "low_rank"
    rank: int = 1
    antithetic: bool = False
    noise_scale: float = 0.01
    noise_schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Update
    learning_rate: float = 6e-3
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_skipped_steps: int = 10
    # Memory and speed
    population_batch: int = 32
    # Evaluation, checkpoints, logs, seed
    eval_size: int = 512
    eval_every: int = 10
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    log_dir: str = "es_logs"
    run_name: str | None = None
    resume: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for key, low in {
            "num_iterations": 1,
            "prompts_per_iteration": 1,
            "max_new_tokens": 1,
            "rank": 1,
            "max_skipped_steps": 1,
            "population_batch": 1,
            "eval_size": 1,
            "eval_every": 1,
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
        }.items():
            check(getattr(self, key) >= low, key, getattr(self, key), f"at least {low}")
        N = self.population_size
        check(N >= 2, "population_size", N, "at least 2: a member is good or bad only beside others")
        check(not (self.antithetic and N % 2), "population_size", N, "an even number, as antithetic members are pairs")
        check(self.noise_scale > 0, "noise_scale", self.noise_scale, "more than 0")
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        check(0 <= self.seed < 2**32, "seed", self.seed, "at least 0 and less than 2^32")
        check(self.rewards, "rewards", self.rewards, "at least one reward function with its weight")

    @property
    def num_noises(self):
        return self.population_size // 2 if self.antithetic else self.population_size


# ----------------------------------------------------------------------------------------------------------------------
# The maths
# ----------------------------------------------------------------------------------------------------------------------


def z_scores(rewards):
    """z-scores of the members' mean rewards, (N,), float64. Equal rewards give exactly 0; a NaN is a ValueError.

    Equality is asked of the rewards, not of a standard deviation, whose rounding error an epsilon would blow up.
    """
    rewards = rewards.double()
    if not rewards.isfinite().all():
        member = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"rewards: that of member {member} is {float(rewards[member])}, expected a finite number")
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def noise_of_member(member, antithetic):
    """Which of the K noises a member has, and its sign."""
    return (member // 2, 1 - 2 * (member % 2)) if antithetic else (member, 1)


def noise_shapes(parameters, perturbation, rank):
    """What is drawn for each of {name: parameter}: its own shape; for a matrix (out, in) under "low_rank" the rows of
    A (out, r) and B (in, r), one above the other."""
    return {
        name: (sum(p.shape), rank) if perturbation == "low_rank" and p.ndim == 2 else tuple(p.shape)
        for name, p in parameters.items()
    }


def noise_generators(seed, iteration, noises, num_noises, device):
    """The streams that some of an iteration's K noises, by their numbers, are drawn from, parameter after parameter."""
    return [seeded_generator(seed, "noise", iteration * num_noises + noise, device) for noise in noises]


def draw(shape, generator):
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


def displacement(parameters, master, theta_0):
    """||theta - theta_0||, and the slope of the model's displacement from theta_0 on the master's: 1 if no update was
    lost to rounding. Arguments: {name: tensor} each."""
    products = torch.zeros(2, device=next(iter(master.values())).device, dtype=torch.float64)
    for name, start in theta_0.items():
        intended, realised = master[name] - start.float(), parameters[name].float() - start.float()
        products += torch.stack([intended.square().sum(), (intended * realised).sum()])
    square, product = products.tolist()
    return math.sqrt(square), product / square if square > 0 else 1.0


def noise_scale_warning(base, rewards, tie_rate):
    """What is wrong with the noise scale by the members' rewards (N,) beside that of the model as it is, or None."""
    mean = float(rewards.mean())
    if base - mean > 0.5 * abs(base):
        return f"noise_scale is too large: noise takes the mean reward from {base:.3f} to {mean:.3f}, a collapse"
    if tie_rate > 0.5:
        return (
            f"noise_scale is too small, or the reward too rare: {tie_rate:.0%} of all pairs of members have the same "
            "reward, which says little about their noise"
        )
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Members
# ----------------------------------------------------------------------------------------------------------------------


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
    """ValueError if Population has no hook for a module with parameters, or if a matrix is smaller than the rank."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError(
            f"perturbation: low_rank, but {type(model).__name__} has no Linear layers; gaussian needs none"
        )
    for path, module in model.named_modules():
        kind, has_weights = type(module).__name__, any(True for _ in module.parameters(recurse=False))
        # A subclass may do more than its parent: Gemma's embedding scales what it looks up.
        if has_weights and type(module) not in (nn.Linear, nn.Embedding) and not kind.endswith("RMSNorm"):
            raise ValueError(f"perturbation: low_rank cannot perturb {path}, a {kind}; gaussian can")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and rank > min(parameter.shape):
            raise ValueError(f"rank: {rank} is more than {name}, {tuple(parameter.shape)}, can have")


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


# ----------------------------------------------------------------------------------------------------------------------
# Journal
# ----------------------------------------------------------------------------------------------------------------------


class Journal:
    """`journal.jsonl`: what it takes to make a run's weights again, bit for bit, from those that it started from.

    The first line is the header: what the run is. Each further line is a state of the weights: iteration 0, before any
    update, then one line an iteration, appended when all of the iteration is done, and flushed to disk. So a run that
    is killed at any moment loses at most the iteration that it was in. Every line holds a digest of itself.
    """

    def __init__(self, folder, identity):
        """Starts the journal, or reads and goes on with what is there; a last line that was cut off is dropped.

        ValueError, naming key or line, if it is the journal of another run than `identity` says, or if a line is
        missing or damaged.
        """
        path = folder / "journal.jsonl"
        self.states = []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if not lines:
            if (folder / "config.yml").exists():  # which is written after the header
                raise ValueError(f"resume: {path} is empty or missing, though this run had begun: start another")
            lines = [seal(identity)]
            write_file(path, lines[0])
        for number, text in enumerate(lines):
            try:
                line = unseal(text)
            except ValueError:
                raise ValueError(f"resume: {path}, line {number + 1}: damaged: {text[:60]!r}") from None
            if number == 0:
                check_same_run(identity, line, path)
            elif line["iteration"] != number - 1:
                raise ValueError(f"resume: {path}, line {number + 1}: a line before this one is missing")
            else:
                self.states.append(line)
        with open(path, "ab") as file:
            file.truncate(sum(map(len, lines)))
        self.file = AppendedFile(path)

    def append(self, state):
        self.file.append(seal(state), sync=True)


@torch.no_grad()
def load_master(path, master):
    """The fp32 weights of a checkpoint's model into the master, {name: tensor}."""
    check(path.is_dir(), "resume", str(path), "a folder that all processes can see")
    saved = dict(load_model(str(path), "float32", "cpu").named_parameters())
    for name, weight in master.items():
        weight.copy_(saved[name])


def apply_update(master, shapes, iteration, z, learning_rate, config, device):
    """The update of one iteration: what the training loop makes, and what a journal's line makes again."""
    K = config.num_noises
    generators = noise_generators(config.seed, iteration, range(K), K, device)
    update_master(master, shapes, generators, z, learning_rate, config.antithetic)


def replay(states, master, shapes, config, device):
    """Apply the updates of a journal's states to the master. ValueError if other weights come out than the run had."""
    for state in states:
        if state["iteration"] > 0:
            apply_update(master, shapes, state["iteration"] - 1, state["z"], state["learning_rate"], config, device)
        if fingerprint(master) != state["weights"]:
            raise ValueError(
                f"resume: iteration {state['iteration']} of the journal does not give the weights that the run had: "
                "this CPU or GPU, or these versions, compute otherwise"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def main(config, stop_requested=lambda: False):
    """Train. stop_requested: asked before every iteration; True ends the run there, to be resumed later."""
    start = time.perf_counter()
    # Set-up: everything that can be wrong with config and data is found before the model is loaded.
    accelerator = make_accelerator(config.device, "float32")  # no autocast: weights are in the dtype to compute in
    world, process, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    train_set, test_items = load_problems(config, world)
    N, P = config.population_size, config.prompts_per_iteration
    # With low_rank a batch holds members whole, as their rows share hooks; with gaussian it holds rows of one.
    members_at_once, block = (config.population_batch, P) if config.perturbation == "low_rank" else (1, None)
    check(N >= world, "population_size", N, f"at least {world}, one for each process")
    is_main = accelerator.is_main_process
    folder = run_folder(config, "journal.jsonl") if is_main else None

    model = load_model(config.model, config.dtype, device, config.cache_dir)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.requires_grad_(False)
    tokenizer = load_tokenizer(config.model, config.cache_dir)
    train_prompts, test_prompts = (
        encode_prompts(tokenizer, [item["prompt"] for item in items], config.system_prompt)
        for items in (train_set, test_items)
    )
    check_prompt_lengths(model, train_prompts + test_prompts, config.max_new_tokens)
    if config.perturbation == "low_rank":
        check_low_rank(model, config.rank)
    free_keys = {"population_batch"}  # changes the rounding at most
    if config.lr_schedule == config.noise_schedule == "constant":  # else they depend on where the run ends
        free_keys.add("num_iterations")
    identity = {"kind of device": device.type}
    identity |= run_identity(config, model, train_prompts + test_prompts, [*train_set, *test_items], free_keys)
    parameters = dict(model.named_parameters())  # a tied one once
    theta_0 = {name: parameter.clone() for name, parameter in parameters.items()}
    master = {name: parameter.float().clone() for name, parameter in parameters.items()}
    shapes = noise_shapes(parameters, config.perturbation, config.rank)

    # Go on where the journal ends: from the newest checkpoint that is whole, or from the start, make its updates again.
    states, checkpoint = [], None
    if is_main:
        config, lock = open_run_folder(folder, config)
        journal = Journal(folder, identity)
        states = journal.states
        checkpoint = newest_checkpoint(folder, len(states) - 1)
    folder, states, checkpoint = broadcast_object_list([folder, states, checkpoint])
    num_done, num_made = max(0, len(states) - 1), -1
    check(config.num_iterations >= num_done, "num_iterations", config.num_iterations, f"at least the {num_done} done")
    if checkpoint:
        path, num_made = checkpoint[0] / "model", checkpoint[1]["iteration"]
        load_master(path, master)
        if fingerprint(master) != states[num_made]["weights"]:
            raise ValueError(f"resume: {path} does not hold the weights that the run had at iteration {num_made}")
    missing = tqdm(states[num_made + 1 :], "replay", disable=None if is_main else True, leave=False)
    replay(missing, master, shapes, config, device)
    write_weights(model, master)
    if is_main:
        write_file(folder / "config.yml", config_text(config).encode())  # with which --config resumes the run
    last = (num_done, states[-1]["generated_tokens"]) if states else (-1, -1)
    logger = Logger(folder if is_main else None, config, *last)
    print_banner(
        config,
        model,
        accelerator,
        sum(parameter.numel() for parameter in parameters.values()),
        train_set,
        test_items,
        step=f"{N} members x {P} prompts = {N * P:,} completions, up to {N * P * config.max_new_tokens:,} tokens",
        run=f"{config.num_iterations:,} iterations, {config.perturbation} noise -> {folder}",
    )
    if states:
        accelerator.print(f"going on after iteration {num_done}")

    answer = functools.partial(
        generate,
        model,
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
    )
    progress = ProgressBar(config.num_iterations, num_done, is_main)
    log = say if is_main else lambda text: None
    memory_key = "population_batch" if config.population_batch > 1 else "prompts_per_iteration"
    batch_size = HalvingSize(memory_key, config.population_batch * P)

    def evaluate_model(state):
        progress.set_description_str("evaluate")
        result = evaluate(model, tokenizer, test_items, test_prompts, config.max_new_tokens, batch_size, accelerator)
        logger.evaluation(result, state["iteration"], state["generated_tokens"], state["seconds"])
        iteration, strict, lenient = state["iteration"], result["strict"], result["lenient"]
        log(f"iteration {iteration:4d}  held-out: strict {strict:.1%}, lenient {lenient:.1%}")
        return {"strict": strict, "lenient": lenient}

    def commit(state):
        """What was done is done: from here on a killed run goes on after this state."""
        states.append({**state, "weights": fingerprint(master)})
        check_processes_agree(states[-1]["weights"], accelerator)
        if is_main:
            journal.append(states[-1])

    def save():
        """A checkpoint of the weights as they are now; returns what is wrong if it cannot be saved."""
        progress.set_description_str("save")
        state = {"iteration": len(states) - 1, "weights": states[-1]["weights"]}

        def write(path):
            write_model(model, tokenizer, path / "model", master)

        # What skipped iterations save must not take the place of good ones.
        keep = config.keep_checkpoints + states[-1]["skipped_in_a_row"]
        return save_checkpoint(folder, state["iteration"], state, keep, write) if is_main else None

    unsaved = None
    if not states:
        state = {"iteration": 0, "seconds": 0.0, "generated_tokens": 0, "skipped_steps": 0, "skipped_in_a_row": 0}
        commit({**state, "evaluation": evaluate_model(state)})

    progress.begin()
    for iteration in range(num_done, config.num_iterations):
        if any(gather_object([stop_requested()])):
            break
        seed_libraries(config.seed, iteration, process)
        phase = PhaseTimer(progress)
        iteration_start = time.perf_counter()
        noise_scale = config.noise_scale * schedule_factor(config.noise_schedule, iteration, config.num_iterations, 0)
        learning_rate = config.learning_rate * schedule_factor(config.lr_schedule, iteration, config.num_iterations, 0)

        # 1. Draw P prompts, the same for all members.
        indices = draw_indices(len(train_set), iteration * P, P, config.seed)
        prompts, items = [train_prompts[i] for i in indices], [train_set[i] for i in indices]

        # 2. Perturb the weights and let every member answer; this process takes its share of the members.
        row_scores = []
        share = range(process * N // world, (process + 1) * N // world)
        for first in range(0, len(share), members_at_once):
            members = share[first : first + members_at_once]
            with phase("perturb"):
                noises, signs = zip(*(noise_of_member(member, config.antithetic) for member in members), strict=True)
                generators = noise_generators(config.seed, iteration, noises, config.num_noises, device)
                if config.perturbation == "gaussian":
                    write_member(model, master, noise_scale * signs[0], generators[0])
                    population = contextlib.nullcontext()
                else:
                    scales = noise_scale * torch.tensor(signs, device=device)
                    population = Population(model, shapes, generators, scales, P)
            with phase("rollout"), population as on_rows:
                completions = answer(prompts * len(members), batch_size=batch_size, on_rows=on_rows, block_size=block)
            with phase("reward"):
                row_scores += score_completions(config.rewards, completions, tokenizer, items * len(members))
        scores = gather_scores(row_scores, device)  # of all N * P rows, member after member
        rewards = scores["reward"].view(N, P).double().mean(dim=1)  # (N,)

        # 3. How good was each member's noise? And, in the first iteration: is the noise of a sensible size?
        skipped = non_finite(scores)  # why this iteration makes no update
        z = torch.zeros(N) if skipped else z_scores(rewards)
        ties = (rewards[:, None] == rewards).double()  # (N, N)
        tie_rate = float((ties.sum() - N) / (N * (N - 1)))
        if iteration == 0:
            with phase("preflight"):
                write_weights(model, master)
                completions = answer(prompts, batch_size=batch_size)
                base = gather_scores(score_completions(config.rewards, completions, tokenizer, items), device)["reward"]
            logger.scalars({"es/unperturbed_reward": base.mean()}, 1)
            log(f"mean reward of the model as it is {base.mean():.3f}, of its perturbed members {rewards.mean():.3f}")
            warning = noise_scale_warning(float(base.mean()), rewards, tie_rate)
            if warning:
                log(f"warning: {warning}")

        # 4. Update the fp32 master, and go back to it: by a copy.
        with phase("update"):
            apply_update(master, shapes, iteration, z.tolist(), learning_rate, config, device)
            write_weights(model, master)

        # 5. Log, evaluate now and then, write down that the iteration is done, and save a checkpoint now and then.
        seconds = time.perf_counter() - iteration_start
        state = {
            "iteration": iteration + 1,
            "rewards": None if skipped else rewards.tolist(),
            "z": z.tolist(),
            "noise_scale": noise_scale,
            "learning_rate": learning_rate,
            "seconds": states[-1]["seconds"] + seconds,
            "generated_tokens": states[-1]["generated_tokens"] + int(scores["length"].sum()),
            "skipped_steps": states[-1]["skipped_steps"] + bool(skipped),
            "skipped_in_a_row": states[-1]["skipped_in_a_row"] + 1 if skipped else 0,
        }
        distance, slope = displacement(parameters, master, theta_0)
        metrics = {
            **completion_metrics(scores),
            "es/reward_min": rewards.min(),
            "es/reward_mean": rewards.mean(),
            "es/reward_max": rewards.max(),
            "es/reward_std": rewards.std(correction=0),
            "es/tie_rate": tie_rate,
            "es/distance": distance,
            "es/update_slope": slope,
            "es/noise_scale": noise_scale,
            "optim/learning_rate": learning_rate,
            "optim/skipped_steps": state["skipped_steps"],
            "time/step": seconds,
            **{f"time/{name}": value for name, value in phase.seconds.items()},
            "throughput/tokens_per_second": scores["length"].sum() / seconds,
            "throughput/rollout_tokens_per_second": scores["length"].sum() / phase.seconds["rollout"],
            "progress/prompts": (iteration + 1) * P,
            "progress/completions": (iteration + 1) * N * P,
            "progress/generated_tokens": state["generated_tokens"],
            "progress/seconds": state["seconds"],
        }
        if device.type == "cuda":
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        logger.scalars(metrics, iteration + 1)
        progress.step_done(iteration + 1, metrics)
        if skipped:
            log(f"iteration {iteration + 1} skipped: {skipped}")
            check_skipped(iteration + 1, state["skipped_in_a_row"], config.max_skipped_steps, skipped, folder)
        if (iteration + 1) % config.eval_every == 0 or iteration + 1 == config.num_iterations:
            state["evaluation"] = evaluate_model(state)
        commit(state)
        if (iteration + 1) % config.checkpoint_every == 0 or iteration + 1 == config.num_iterations:
            unsaved = save()

    if len(states) - 1 < config.num_iterations:  # asked to stop
        unsaved = save()
        progress.close()
        accelerator.print(f"stopped after iteration {len(states) - 1}; to go on:\n    {resume_command(folder)}")
    else:
        before, after = states[0]["evaluation"], states[-1].get("evaluation") or evaluate_model(states[-1])
        progress.close()
    if is_main and len(states) - 1 == config.num_iterations:
        logger.finished()
        print_summary(before, after, len(test_items), states[-1]["seconds"], time.perf_counter() - start)
        with whole_folder(folder / "model") as path:
            write_model(model, tokenizer, path)
        print(f"TensorBoard: tensorboard --logdir={config.log_dir}\nThe result is {folder / 'model'}; to load it:")
        print(f'    AutoModelForCausalLM.from_pretrained("{folder / "model"}")')
    is_behind = False
    if is_main:
        journal.file.append(b"", sync=True)  # what waits for room on the disk, once more
        is_behind = logger.is_behind() or journal.file.waiting
        lock.close()
    accelerator.end_training()
    if unsaved or is_behind:
        raise OSError(unsaved or f"{folder}: journal.jsonl or the TensorBoard log lacks its last lines")


if __name__ == "__main__":
    run_from_command_line(
        main,
        ESConfig,
        "es_config.yml",
        example="noise_scale=0.02",
        memory_keys="population_batch, prompts_per_iteration or max_new_tokens, or set dtype: bfloat16",
    )
