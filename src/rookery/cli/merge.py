"""Put an adapter into the model that it was trained on. OUT is whole or absent; its ending names the format."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="model file, folder or Hub id that the adapter was trained on")
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="file of RWKV-PEFT (lora, pissa, bone, disha) or peft folder"
    )
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="where to write the merged model")
    parser.add_argument("--alpha", type=float, metavar="X", help="alpha of a LoRA whose file does not say it")
    parser.add_argument("--undo", action="store_true", help="take the adapter out of BASE, which holds it, again")
    parser.add_argument(
        "--allow-sequential", action="store_true", help="let BAT go on top of another adapter, whose place matters"
    )
    parser.add_argument("--to", metavar="NAME", help="format, as of `rookery convert`")
    parser.add_argument("--dtype", metavar="TYPE", help="precision, as of `rookery convert`")


def run(args: argparse.Namespace) -> int:
    from rookery.checkpoints.adapter import adapted
    from rookery.checkpoints.checkpoint import open_checkpoint
    from rookery.cli.convert import write

    how = {"alpha": args.alpha, "undo": args.undo, "sequential": args.allow_sequential}
    merged = adapted(open_checkpoint(args.base), args.adapter, **how)
    return write(merged, args.out, to=args.to, dtype=args.dtype)
