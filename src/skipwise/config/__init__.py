"""What the user asks for, and where it is written. No torch.

Reading order:  recipe, parse, lengths; samplers, distillation, stages; run_folder, machine
"""
