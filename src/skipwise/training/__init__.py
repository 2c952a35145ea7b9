"""One Trainer, its loss and its stages.

Reading order:  inputs, setup, arguments, trainer, callbacks; chunked_loss, distillation, teacher;
                checkpoints, full_length_stage, error_hints; distributed/
"""
