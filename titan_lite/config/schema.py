"""The reference manual of every TOML key: one frozen model per table, a docstring under each field.

Units are in the docstrings. A key that is not listed here is an error, never ignored.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from titan_lite.config.activation_checkpoint import (
    CHECKPOINT_MODES,
    ActivationCheckpoint,
    NoCheckpoint,
)
from titan_lite.config.needs import Needs
from titan_lite.config.optimizers import OPTIMIZERS, AdamW, Optimizer
from titan_lite.config.registry import SINKS
from titan_lite.config.schedules import SCHEDULES, Looped, PipelineSchedule
from titan_lite.config.section import (
    Dropped,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Timeout,
)
from titan_lite.config.tagged import TaggedTable

DType = Literal["float32", "bfloat16", "float16"]
AsyncMode = Literal["disabled", "async", "async_pinned"]
NormKind = Literal["rmsnorm", "layernorm"]
FFNKind = Literal["swiglu", "gelu", "gelu_tanh"]
BalanceKind = Literal["none", "sequence", "global_lagged", "micro_batch"]
PositionKind = Literal["rotary", "learned"]
ScoreKind = Literal["softmax", "sigmoid"]
AttentionKernel = Literal["auto", "math", "cudnn", "flash2", "flash3", "flash4"]
AUTO_CHUNK_BYTES = 2**29


class Job(Section):
    """[job]: what this run is called and where it writes."""

    dump_folder: str = "outputs"
    """Run folder, with run.json, metrics.jsonl, tb/, checkpoint/ and profile/."""
    description: str = ""
    """Free text, printed at start and kept in run.json."""
    cluster: str = ""
    """Name of a cluster in assets/clusters/, or a TOML file in the format of `titan-lite plan
    calibrate`. run.json and the end of the run then show its predictions next to the measured
    values."""
    plugins: list[str] = []
    """Modules that are imported before the configuration is checked, for example ["my_pkg.setup"].
    They may register optimizers, data sources, metric sinks, schedules and families:
    docs/extending.md."""


class Model(Section):
    """[model]: a family and flavor of the registry, and overrides of single fields of it."""

    name: str = "llama"
    """Family in the model registry."""
    flavor: str = "debug"
    """Flavor (size) of the family."""
    dim: Positive | None = None
    """Overrides the flavor's model width."""
    num_layers: Positive | None = None
    """Overrides the flavor's number of transformer blocks."""
    num_heads: Positive | None = None
    """Overrides the flavor's number of query heads."""
    num_kv_heads: Positive | None = None
    """Overrides the flavor's number of key and value heads."""
    head_dim: Positive | None = None
    """Overrides the number of features per head; default: dim / num_heads."""
    ffn_dim: Positive | None = None
    """Overrides the flavor's feed-forward width."""
    ffn: FFNKind | None = None
    """Overrides the flavor's feed-forward. "swiglu" is gated; "gelu" and "gelu_tanh" are plain,
    with the exact GELU or its tanh approximation."""
    num_experts: Positive | None = None
    """Overrides the number of experts of a Mixture-of-Experts flavor; ffn_dim is the width of
    each."""
    top_k: Positive | None = None
    """Overrides the number of experts per token."""
    route_norm: bool | None = None
    """Overrides whether the weights of a token's experts are divided by their sum."""
    balance_loss: BalanceKind | None = None
    """Overrides the loss that balances the experts of each block. "sequence": computed for each
    sequence; "global_lagged": computed with the loads of the previous step's global batch.
    "micro_batch" is refused, because its result depends on the layout."""
    balance_coeff: Annotated[float, Field(ge=0)] | None = None
    """Overrides the factor of balance_loss."""
    z_loss_coeff: Annotated[float, Field(ge=0)] | None = None
    """Overrides the factor of the squared log-sum-exp of the router's logits, a loss that keeps
    them small."""
    route_bias: bool | None = None
    """Overrides whether each expert has a bias, which is added to its scores for the choice of
    experts only."""
    bias_rate: Annotated[float, Field(ge=0)] | None = None
    """Overrides the change of the biases per step: up for experts with fewer tokens than the mean,
    down for those with more. Requires model.route_bias = true."""
    norm: NormKind | None = None
    """Overrides the flavor's normalisation."""
    qkv_bias: bool | None = None
    """Overrides whether the flavor's query, key and value projections have biases."""
    out_bias: bool | None = None
    """Overrides whether the flavor's attention output projection has a bias."""
    ffn_bias: bool | None = None
    """Overrides whether the flavor's feed-forward projections have biases."""
    qk_norm: bool | None = None
    """Overrides whether the flavor normalises each head of queries and keys."""
    parallel_residual: bool | None = None
    """Overrides whether attention and feed-forward both read the block's input; false: the
    feed-forward reads the sum of input and attention."""
    positions: PositionKind | None = None
    """Overrides the encoding of positions: "rotary", or a "learned" embedding of max_seq_len
    positions."""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Overrides the share of each head's features that is rotated."""
    vocab_size: Positive | None = None
    """Overrides the flavor's vocabulary size, which must be at least the tokenizer's."""
    max_seq_len: Positive | None = None
    """Overrides the longest sequence, in tokens, that the flavor accepts."""
    rope_theta: PositiveFloat | None = None
    """Overrides the flavor's rotary base frequency."""
    norm_eps: PositiveFloat | None = None
    """Overrides the flavor's normalisation epsilon."""
    tied_head: bool | None = None
    """Overrides whether the flavor's output projection is its embedding table."""
    hidden_dropout: Dropped | None = None
    """Overrides the share of features that training drops from the output of the embeddings, and
    from the outputs of attention and feed-forward. Every layout drops the same ones."""
    attention_dropout: Dropped | None = None
    """Overrides the share of attention weights that training drops. Attention is then not fused,
    and memory grows with seq_len squared."""
    fp32_residual: Annotated[bool | None, Needs("training.param_dtype", unless="float32")] = None
    """Overrides whether the residual stream stays float32 when training.param_dtype is not."""


class Documents(Section):
    """Which documents are read: the keys that several tables have."""

    dataset: Annotated[str, Needs("dataset_path", values=("",))] = "bundled"
    """"bundled" (the corpus in assets/), "c4", or the name of any Hugging Face dataset, which is
    streamed."""
    dataset_path: str = ""
    """Local file, folder or glob of JSON, Parquet, Arrow, text or Megatron's .bin/.idx, or a folder
    written by `titan-lite tokenize` or `datasets.save_to_disk`; replaces `dataset`."""
    subset: Annotated[
        str, Needs("dataset_path", values=("",)), Needs("dataset", unless="bundled")
    ] = ""
    """Name of the configuration of a Hugging Face dataset, for example "en"."""
    split: str = "train"
    """Split of a Hugging Face dataset, of a folder of DatasetDict.save_to_disk, or of the bundled
    corpus: "train" or "validation"."""
    text_field: str = "text"
    """Field of a document that contains its text."""
    tokens_field: str = ""
    """Field of a document that contains its token ids, which replace the text. Empty: "input_ids",
    for documents that have that field and lack text_field."""


class DataSource(Documents):
    """[[data.sources]]: documents that are mixed with those of other sources."""

    name: Annotated[str, Field(min_length=1)]
    """Name of the source in the metrics: source/NAME/loss."""
    weight: PositiveFloat
    """Share of the samples, relative to the other weights."""


class Data(Documents):
    """[data]: documents, tokenizer, packing order and read-ahead."""

    sources: list[DataSource] = []
    """Several sets of documents, which replace the one that the keys above select. Each has a table
    [[data.sources]] with the keys above, a `name` and a `weight`."""
    on_bad_document: Literal["raise", "skip"] = "raise"
    """Handling of a document that is not JSON or not UTF-8, or whose text is missing, empty, not a
    string or not valid Unicode. "raise" ends the run with file and line; "skip" leaves it out and
    counts it. In Parquet, Arrow and datasets by name only the text is checked. "skip" also leaves
    out, with a warning, local .parquet files that cannot be opened. A file that can be opened, but
    turns out to be damaged when it is read further, ends the run."""
    tokenizer_path: str = ""
    """A tokenizer file, or a folder that has one: a tokenizer.json of Hugging Face, a sentencepiece
    model, or a table in tiktoken's format (base64 token, rank), as Llama 3's tokenizer.model.
    BOS and EOS are those of tokenizer_config.json or special_tokens_map.json in the same folder; if
    neither file names them, their usual spellings are used. Empty: the bundled tokenizer."""
    allow_tokenizer_mismatch: bool = False
    """Accept a tokenizer that does not match the model: one that fills less than 90 % of the
    vocabulary, or one that gives other ids than the tokenizer of the checkpoint or Hugging Face
    model from which the weights are loaded."""
    packing: Literal["concat", "document", "fixed", "none"] = "concat"
    """Content of a sample of training.seq_len tokens, and tokens that may attend to each other.
    "concat": documents one after the other, attention crosses their borders; "document": as
    "concat", but attention, positions and loss stay inside a document; "fixed": as "concat", but
    attention and positions stay inside blocks of `packing_block` tokens; "none": one document,
    padded, or a part of a longer one."""
    packing_block: Annotated[Positive, Needs("packing", values=("fixed",))] = 2048
    """Tokens of a block with packing = "fixed". It must divide training.seq_len into at least 2
    blocks."""
    shuffle: bool = True
    """Shuffle documents, by training.seed, in a different order in each epoch."""
    shuffle_buffer: Annotated[Positive, Needs("shuffle", values=(True,))] = 8192
    """Number of documents that are shuffled together, summed over all streams. Each stream shuffles
    shuffle_buffer / num_streams documents at a time."""
    num_streams: Positive = 64
    """Number of streams, the parts into which the documents are divided. They are the same in every
    layout. With a multiple of the data-parallel degree, each stream is read by only one
    data-parallel rank."""
    tokenizer_threads: Positive = 1
    """Threads for tokenizing, per process."""
    prefetch: Positive = 4
    """Micro-batches prepared ahead of the training step, per process."""

    @property
    def masks_attention(self) -> bool:
        """True if a token attends to only a part of the tokens before it in its sample."""
        return self.packing in ("document", "fixed")


class MaskedLM(Section):
    """[masked_lm]: how documents become the samples of a masked language model, as bert."""

    mask_prob: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of a sample's tokens that are predicted. 80 % of these are replaced by the mask and 10
    % by a random token of text; 10 % stay."""
    whole_word_masking: bool = False
    """Predict all tokens of some words instead of single tokens."""
    short_seq_prob: Fraction = 0.1
    """Share of the samples that are cut to a random length."""
    next_sentence: bool = True
    """Samples are pairs of spans; in half of them the second does not follow the first, and the
    model is trained to predict this. false: one span per sample, no next-sentence loss."""


class Training(Section):
    """[training]: length, batch, precision, determinism."""

    steps: Positive = 10_000
    """Optimizer steps of the run."""
    seq_len: Positive = 2048
    """Tokens per sample."""
    local_batch_size: Positive = 1
    """Samples per micro-batch and data-parallel rank."""
    global_batch_size: Positive | Literal[-1] = -1
    """Samples per optimizer step over all ranks, reached by gradient accumulation. -1:
    local_batch_size x data-parallel degree."""
    max_norm: NonNegativeFloat = 1.0
    """The global gradient norm is clipped to this; 0: no clipping, the norm is only logged."""
    nonfinite: Annotated[Literal["stop", "skip"], Needs("param_dtype", unless="float16")] = "stop"
    """Handling of a step whose loss or gradient norm is NaN or Inf: "stop" ends the run without
    applying it and names the parameters at fault, "skip" drops the step and counts it. float16 uses
    loss scaling instead."""
    param_dtype: DType = "bfloat16"
    """Type of gathered parameters and activations; master weights are always float32. "float16",
    for devices without bfloat16, uses dynamic loss scaling."""
    reduce_dtype: DType = "float32"
    """Type in which gradients are reduced across ranks."""
    loss_positions: Literal["all", "labelled"] = "all"
    """Positions that the output projection computes. "labelled": only those with a label, for
    masked language models and padded samples."""
    loss_chunks: Positive | Literal["auto"] = "auto"
    """Number of chunks in which output projection and cross-entropy are computed, so that full
    logits never exist; "auto": the fewest, up to 8, whose float32 logits fit into 512 MiB. With
    several chunks, the gradient of the output projection's weight is summed in float32."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of the weights, the data order and every generator."""
    deterministic: bool = False
    """Use deterministic algorithms only; slower on GPUs."""
    gc_freq: Positive = 50
    """Steps between garbage collections of Python; the automatic ones are off."""


def auto_loss_chunks(logits_bytes: float) -> int:
    """Returns the chunks of loss_chunks = "auto". logits_bytes: of a micro-batch, in float32."""
    return min(8, math.ceil(logits_bytes / AUTO_CHUNK_BYTES))


class Validation(Documents):
    """[validation]: the loss over held-out documents, the same ones from their start each time."""

    NEEDS: ClassVar = Needs("enable", values=(True,))

    dataset: Annotated[str, Needs("dataset_path", values=("",))] = ""
    """Dataset for validation; empty: data.dataset. With data.dataset_path or data.sources,
    validation requires this key or validation.dataset_path."""
    split: str = "validation"
    """Split of the dataset that validation reads."""
    enable: bool = False
    """Validate every `interval` steps and after the last one."""
    interval: Positive = 500
    """Steps between validations."""
    steps: Positive = 10
    """Batches of training.global_batch_size samples in each validation."""


class LRScheduler(Section):
    """[lr_scheduler]: warm-up, optional stable phase, decay to a floor."""

    warmup_steps: NonNegative = 200
    """Steps of linear warm-up from 0 to the peak."""
    decay_type: Literal["linear", "cosine", "sqrt", "inverse_sqrt", "constant"] = "cosine"
    """Shape of the decay; "sqrt" falls as 1 - sqrt(progress); "inverse_sqrt" falls as sqrt(start /
    step), and has no end."""
    decay_ratio: Annotated[Fraction, Needs("decay_type", unless="constant")] = 1.0
    """Share of training.steps for the decay, at the end of the run. 1.0: the decay starts after the
    warm-up; less: warm-up, stable, decay (WSD)."""
    decay_start: Annotated[NonNegative | Literal[-1], Needs("decay_type", unless="constant")] = -1
    """Last step at the peak, at least warmup_steps and below training.steps; -1: computed from
    decay_steps or decay_ratio."""
    decay_steps: Annotated[Positive | Literal[-1], Needs("decay_type", unless="constant")] = -1
    """Steps of the decay, after which the learning rate stays at the floor; -1: from decay_start to
    the last step, or computed from decay_ratio."""
    min_lr_factor: Annotated[Fraction, Needs("decay_type", unless="constant")] = 0.1
    """Floor of the decay, as a share of the peak."""
    rewarmup_steps: NonNegative = 0
    """Steps of a second linear warm-up, from 0 to the value that the schedule has after it."""
    rewarmup_start: Annotated[NonNegative, Needs("rewarmup_steps", above=0)] = 0
    """Step after which the second warm-up starts, normally that of the checkpoint to continue from.
    A restart during or after the second warm-up does not warm up again."""


class EMA(Section):
    """[ema]: an exponential moving average of the weights, 4 bytes per parameter, sharded alike."""

    NEEDS: ClassVar = Needs("enable", values=(True,))

    enable: bool = False
    """Keep an exponential moving average of the weights, and save it in checkpoints."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Each step: average = decay x average + (1 - decay) x weights."""
    start_step: NonNegative = 0
    """Up to this step the average equals the weights."""
    validation: Annotated[bool, Needs("validation.enable", values=(True,))] = True
    """Validate with the average instead of the weights."""
    export: Annotated[
        bool, Needs("checkpoint.last_save_hf", "checkpoint.last_save_model_only", values=(True,))
    ] = False
    """checkpoint.last_save_hf and last_save_model_only write the average instead of the weights."""


class Parallel(Section):
    """[parallel]: degrees of each mesh axis, in mesh order pp, dp_replicate, dp_shard, cp, tp."""

    dp_replicate: Positive = 1
    """Replicas of the sharded model (HSDP's outer axis)."""
    dp_shard: Positive | Literal[-1] = -1
    """Ranks over which FSDP2 shards; -1: the world size divided by the other degrees."""
    cp: Positive = 1
    """Context-parallel degree: number of ranks that share each sequence."""
    cp_method: Annotated[Literal["ring", "all_gather", "ulysses"], Needs("cp", above=1)] = "ring"
    """Exchange for attention under context parallel. "ring": keys and values are sent around a ring
    while attention is computed; "all_gather": keys and values are gathered at once; "ulysses": each
    rank gets all tokens for some of the heads."""
    ep: Positive = 1
    """Expert-parallel degree: number of ranks that share the experts of each block. It must divide
    dp_shard x cp x tp. Tokens are sent to the ranks of their experts, and the results back."""
    tp: Positive = 1
    """Tensor-parallel degree."""
    pp: Positive = 1
    """Pipeline-parallel degree."""
    pp_schedule: Annotated[str, SCHEDULES, Needs("pp", above=1)] = "1F1B"
    """Order in which a rank computes its micro-batches of local_batch_size samples, by its name in
    torch.distributed.pipelining; plugins add others."""
    pp_stages_per_rank: Annotated[
        Annotated[int, Field(ge=2)],
        Needs("pp", above=1),
        Needs("pp_schedule", values=Looped()),
    ] = 2
    """Stages of each rank with Interleaved1F1B, LoopedBFS and InterleavedZeroBubble; the other
    schedules have one, or two in a V."""
    pp_micro_batches: Annotated[Positive | Literal[-1], Needs("pp", above=1)] = -1
    """Micro-batches of one pass through the pipeline, after which gradients are reduced; -1: all of
    an optimizer step. With fewer micro-batches per pass, a step makes several passes, and GPipe
    uses less memory."""
    pp_split: Annotated[
        Literal["uniform", "parameters", "time", "explicit"], Needs("pp", above=1)
    ] = "time"
    """How blocks are split into stages. "uniform": equal numbers of blocks; "parameters": equal
    numbers of parameters, including embedding and head; "time": equal FLOPs, including the head;
    "explicit": as listed in `pp_stage_modules`."""
    pp_stage_modules: Annotated[
        list[list[str]], Needs("pp", above=1), Needs("pp_split", values=("explicit",))
    ] = []
    """Modules of each stage with pp_split = "explicit", for example [["tok_embeddings",
    "layers.0"], ...]."""
    sequence_parallel: Annotated[bool, Needs("tp", above=1)] = True
    """Under tensor parallel, split activations between blocks over the sequence."""
    loss_parallel: Annotated[bool, Needs("tp", above=1)] = True
    """Under tensor parallel, compute the loss from logits that are split over the vocabulary;
    false: gather each chunk's logits on every rank."""
    async_tp: bool = False
    """Overlap the collectives of tensor parallel with the matmuls next to them. Requires tp > 1,
    sequence_parallel = true, compile.enable = true with the component "model", and GPUs with
    NVLink."""
    reshard_after_forward: Literal["default", "always", "never", "last_block_kept"] | Positive = (
        "default"
    )
    """When FSDP2 frees gathered weights after forward: "always" (ZeRO-3); "never" (ZeRO-2);
    "last_block_kept": all but those of the last block, norm and head; an integer n: blocks stay
    sharded over groups of n ranks, norm and head stay whole. The default is "never" with pp > 1,
    where each micro-batch would gather again, and if FSDP shards over one rank, where nothing is
    sent; otherwise it is "last_block_kept"."""
    gradient_sync: Literal["every_micro_batch", "last_micro_batch"] = "every_micro_batch"
    """When gradients are reduced during accumulation. "last_micro_batch": until then every rank
    keeps whole gradients, 4 bytes per parameter (communication of ZeRO-1)."""
    fsdp_symm_mem: bool = False
    """FSDP2 gathers and reduces from symmetric memory, for which NCCL has faster kernels. With
    NCCL_CTA_POLICY=2 in the environment, NCCL uses copy engines instead of kernels inside a node.
    Requires torch 2.13, CUDA and async_tp = false."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and copy them to the device
    when they are used."""

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages of each rank under the schedule."""
        return self.schedule.stages_per_rank or self.pp_stages_per_rank

    @property
    def schedule(self) -> PipelineSchedule:
        """The facts of the schedule."""
        return SCHEDULES[self.pp_schedule]

    @property
    def num_stages(self) -> int:
        """Pipeline stages of all ranks, 1 without pipeline parallel."""
        return self.pp * self.stages_per_rank if self.pp > 1 else 1

    def micro_batches_per_pass(self, micro_steps: int) -> int:
        """Micro-batches of a pass through the pipeline, of the `micro_steps` of a step."""
        return micro_steps if self.pp_micro_batches == -1 else self.pp_micro_batches


class Attention(Section):
    """[attention]: how attention is computed."""

    kernel: AttentionKernel = "auto"
    """Kernel of attention. "auto": torch's choice; with parallel.cp_method "ring" or "all_gather":
    cuDNN on GPUs of capability 9 and 10, else flash attention. "math": the plain formula, whose
    memory grows with seq_len squared. "cudnn", "flash2": torch's own. "flash3", "flash4": from the
    packages flash_attn_interface and flash_attn.cute."""


class Compile(Section):
    """[compile]: torch.compile, whose graphs are cached on disk between runs."""

    enable: bool = False
    """Compile the parts in `components`."""
    components: Annotated[
        Annotated[list[Literal["model", "loss"]], Field(min_length=1)],
        Needs("enable", values=(True,)),
    ] = ["model", "loss"]
    """"model": each transformer block, with fullgraph=True; equal blocks share one graph. "loss":
    the cross-entropy, without the matmuls of the output projection."""

    def covers(self, component: Literal["model", "loss"]) -> bool:
        """True if this part of a step is compiled."""
        return self.enable and component in self.components


class Float8(Section):
    """[float8]: matrix products of the blocks' linears in 8-bit floating point, by torchao."""

    NEEDS: ClassVar = Needs("recipe", unless="none")

    recipe: Literal["none", "tensorwise", "rowwise", "rowwise_gw_hp"] = "none"
    """"tensorwise": one scale per tensor; it is the fastest, and the only one with collectives in
    float8 (the all-gather of sequence parallel, and fsdp_all_gather). "rowwise": one scale per row,
    a power of two. "rowwise_gw_hp": as "rowwise", with the weight gradient in high precision."""
    fsdp_all_gather: bool = False
    """FSDP gathers the weights in float8 instead of param_dtype. Requires recipe =
    "tensorwise"."""
    filter: list[str] = []
    """Linears that stay in high precision: names of modules, in which "*" stands for any characters
    but dots, for example "layers.0.attention.w*". The output head and linears whose rows or columns
    are not multiples of 16 always stay."""
    min_dim: NonNegative = 0
    """Linears with fewer rows or columns than this stay in high precision."""
    emulate: bool = False
    """Round to float8 and multiply in float32: the same numbers, slowly, on devices without
    float8."""


class Checkpoint(Section):
    """[checkpoint]: saving, resuming, and starting from the weights of another run."""

    NEEDS: ClassVar = Needs("enable", values=(True,))
    # A fresh start takes weights from elsewhere without saving any.
    ALWAYS: ClassVar = ("load_step", "initial_load_path", "initial_load_hf")

    enable: bool = False
    """Save checkpoints, and resume from them."""
    folder: str = "checkpoint"
    """Folder of the checkpoints, below job.dump_folder unless absolute."""
    interval: Positive = 500
    """Steps between saves; the last step is always saved."""
    async_mode: AsyncMode = "disabled"
    """When training continues after a save starts. "disabled": when everything is on the disk;
    "async": when everything is copied to host memory; "async_pinned": at once; the copy must be
    finished before the next optimizer step, and its pinned host memory is kept for the next
    save."""
    keep_latest_k: NonNegative = 10
    """Number of newest checkpoints that are kept; 0 keeps all."""
    keep_every: Annotated[NonNegative, Needs("keep_latest_k", above=0)] = 0
    """Checkpoints whose step is a multiple of this are never deleted; 0: no such checkpoints.
    It must be a multiple of `interval`."""
    last_save_model_only: bool = False
    """After the last step, save only weights, in export_dtype. The checkpoint is smaller, but no
    run can resume from it."""
    export_dtype: Annotated[DType, Needs("last_save_model_only", values=(True,))] = "float32"
    """Type of the weights that last_save_model_only saves."""
    load_step: NonNegative | Literal["latest"] = "latest"
    """Step to resume from. "latest": the newest undamaged checkpoint, or step 0 if there are none;
    0: never resume; another step: an error if it is missing or damaged, or not below
    training.steps. Such a step requires checkpoint.enable = true."""
    initial_load_path: str = ""
    """A checkpoint of another run, for example runs/a/checkpoint/step-1000, with whose weights a
    new run starts. Requires checkpoint.enable = true."""
    initial_load_model_only: Annotated[bool, Needs("initial_load_path", unless="")] = True
    """Take only the weights from initial_load_path; false: continue from it, with optimizer, step,
    data position and generators."""
    exclude_from_loading: Annotated[list[str], Needs("initial_load_path", unless="")] = []
    """Parameters that keep their initialization: names, in which "*" stands for any characters,
    dots included, for example "output.*"."""
    allow_model_changes: Annotated[list[str], Needs("initial_load_path", unless="")] = []
    """Settings of the model that may differ from those of the checkpoint in initial_load_path,
    although its weights then compute something else: for example ["tied_head"], or ["name"] for
    another family. rope_theta, rope_scaling and norm_eps may always differ, with a warning."""
    initial_load_hf: str = ""
    """Folder of a Hugging Face model in safetensors, with whose weights a new run starts, also with
    checkpoint.enable = false; the optimizer starts at zero."""
    last_save_hf: bool = False
    """After the last step, also write the weights for transformers, to hf/ in the folder of the
    checkpoints. run_train.sh refuses a run whose exported tokenizer would give other ids than in
    training."""
    allow_export_mismatch: Annotated[bool, Needs("last_save_hf", values=(True,))] = False
    """Write hf/ even if its tokenizer gives some texts other ids than training. Its README.md
    states the difference."""


class Metrics(Section):
    """[metrics]"""

    log_freq: Positive = 10
    """Steps between log lines. The first step after each start, the last step and steps with a
    validation are also logged."""
    enable_tensorboard: bool = True
    """Write TensorBoard events to tb/."""
    enable_wandb: bool = False
    """Log to Weights & Biases, under TensorBoard's names. The environment variables WANDB_PROJECT,
    WANDB_API_KEY and WANDB_MODE set project, token and mode."""
    sinks: list[Annotated[str, SINKS]] = []
    """Names of additional sinks for every record, such as those of plugins. "console" and "jsonl"
    are always active."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s per device that MFU is relative to, for a device that assets/devices.txt does
    not have or that is throttled."""
    power: bool = False
    """Log mean power in watts and joules per token of NVIDIA GPUs. Requires `pip install
    nvidia-ml-py`."""


class Profiling(Section):
    """[profiling]"""

    enable_profiling: bool = False
    """Write torch profiler traces to profile/traces/."""
    profile_freq: Annotated[
        Positive, Needs("enable_profiling", "enable_memory_snapshot", values=(True,))
    ] = 100
    """Steps between traces, or between memory snapshots. A trace has the last 3 steps of a period,
    so enable_profiling requires at least 3."""
    enable_memory_snapshot: bool = False
    """Write CUDA memory snapshots to profile/memory/, every profile_freq steps and at an
    out-of-memory error."""


class Comm(Section):
    """[comm]"""

    init_timeout_seconds: Timeout = 300
    """Process-group timeout up to the end of the first step; at most a week."""
    train_timeout_seconds: Timeout = 100
    """Process-group timeout after the first step; at most a week."""


class Config(Section):
    """A whole run."""

    job: Job = Job()
    model: Model = Model()
    data: Data = Data()
    masked_lm: MaskedLM = MaskedLM()
    training: Training = Training()
    validation: Validation = Validation()
    optimizer: Annotated[SerializeAsAny[Optimizer], BeforeValidator(OPTIMIZERS.validate)] = AdamW()
    lr_scheduler: LRScheduler = LRScheduler()
    ema: EMA = EMA()
    parallel: Parallel = Parallel()
    activation_checkpoint: Annotated[
        SerializeAsAny[ActivationCheckpoint], BeforeValidator(CHECKPOINT_MODES.validate)
    ] = NoCheckpoint()
    attention: Attention = Attention()
    compile: Compile = Compile()
    float8: Float8 = Float8()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    profiling: Profiling = Profiling()
    comm: Comm = Comm()


TAGGED: dict[str, TaggedTable[Any]] = {
    "optimizer": OPTIMIZERS,
    "activation_checkpoint": CHECKPOINT_MODES,
}
"""Tables whose keys depend on one of them."""


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the configuration with other values of section.key, which are of the right types."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        changes.setdefault(section, {})[name] = value
    update: dict[str, Section] = {}
    for name, keys in changes.items():
        section, table = getattr(config, name), TAGGED.get(name)
        update[name] = table.changed(section, keys) if table else section.model_copy(update=keys)
    return config.model_copy(update=update)
