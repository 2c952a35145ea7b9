"""DDP, FSDP2 and DeepSpeed ZeRO-3, and the launcher that starts several processes."""
