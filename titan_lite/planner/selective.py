"""Results that "selective_op" keeps: those of the operations in activation_checkpoint.save."""

from titan_lite.models.args import DecoderArgs, MoEArgs
from titan_lite.planner.counts import attention_matrices, block_products, feed_forwards
from titan_lite.planner.job import Job


def saves_product(job: Job, number: int) -> bool:
    """Returns True if the policy keeps the result of a matmul, numbered as in block_products."""
    return "matmul" in job.saved or ("every_second_matmul" in job.saved and number % 2 == 1)


def saves_sums(job: Job) -> bool:
    """Returns True if the policy keeps sums over tensor-parallel ranks."""
    return ("reduce_scatter" if job.sequence_parallel else "all_reduce") in job.saved


def saved_elements(job: Job, args: DecoderArgs) -> float:
    """Elements per token that the policy keeps of a block, for a micro-batch on a rank.

    A sum over ranks is kept instead of the product that it adds up, which has `dim` features.
    """
    t, saved = job.tp, job.saved
    shared, routed = feed_forwards(args)
    whole = args.dim / (t if job.sequence_parallel else 1)
    products = [width for _, width in block_products(args, t)]
    kept = sum(width for number, width in enumerate(products) if saves_product(job, number))
    if "attention" in saved and not args.attention_dropout:
        # The result, and each head's log-sum-exp in float32.
        kept += args.num_heads * (args.head_size + 4 / job.width) / t
    if t > 1 and saves_sums(job):
        for number in (len(attention_matrices(args)) - 1, *[len(products) - 1] * (shared > 0)):
            kept += whole - args.dim * saves_product(job, number)
    if isinstance(args, MoEArgs) and routed:
        if saves_product(job, len(attention_matrices(args))):
            # The router's result is in float32.
            kept += args.num_experts * (4 / job.width - 1) / t
        if "routing" in saved:
            # Scores in float32, each row's expert, and the order of rows, twice with ep.
            orders = 12 * (args.num_experts + args.groups * (args.groups > 1))
            kept += (orders + 16 * routed * (1 + (job.ep > 1))) / job.width / t
        if "all_to_all" in saved and job.ep > 1:
            kept += 2 * routed * args.dim / t
        if "grouped_matmul" in saved:
            kept += routed * (2 * args.ffn_dim + args.dim) / t
    return kept
