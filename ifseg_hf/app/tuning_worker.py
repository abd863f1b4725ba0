"""The process in which the page tunes a model: `python -m ifseg_hf.app.tuning_worker SETTINGS`.

SETTINGS is a JSON object with settings of [`ifseg_hf.training.config.TrainingConfig`]. The last line on stdout is a
JSON object: `folder` of the tuned model in the cache; or `stopped`; or `error`, a sentence.
"""

import json
import sys

__all__ = ["main"]


def main(settings: dict) -> dict:
    """Returns the answer of the worker; see the module."""
    try:
        from ifseg_hf.hub.published import resolve_checkpoint
        from ifseg_hf.training.errors import TrainingError
        from ifseg_hf.training.recipes import training_config
        from ifseg_hf.tuning import tuned_model

        try:
            resolve_checkpoint(settings["model"])
            return {"folder": str(tuned_model(training_config({"output_dir": "", **settings})))}
        except (OSError, ValueError, TrainingError) as error:
            return {"error": " ".join(str(error).split())}
    except KeyboardInterrupt:  # also TrainingStopped, after a checkpoint
        return {"stopped": True}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
