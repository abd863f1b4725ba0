"""Publish a saved model on the Hub, with its processor, code and model card.

python scripts/push_to_hub.py tuned me/my-words

Needs a token with write permission: `hf auth login` or HF_TOKEN. The README.md of the folder is published as the model
card; without one, a model card is generated.
"""

import argparse
import sys


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="folder of a trained or converted model")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name of the repository, created if it does not exist")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a new repository is private (default: the owner's default)",
    )
    parser.add_argument("--revision", help="branch, created if it does not exist (default: main)")
    parser.add_argument("--commit-message", help="first line of the commit's message")
    parser.add_argument(
        "--base-model", metavar="ID", help="Hub id of the model that this one was trained or converted from"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # Imported after the arguments are parsed, so that mistakes in them are reported at once.
    from ifseg_hf.hub.publish import HubError, push_to_hub

    try:
        print(f"Published: {push_to_hub(**vars(options)).commit_url}")
    except KeyboardInterrupt:
        print("push_to_hub.py: interrupted; run the same command to try again.", file=sys.stderr)
        return 130
    except (HubError, ValueError) as error:
        print(f"push_to_hub.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, HubError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
