"""One W&B sweep file per ablation, profiles, the local runner and the cluster launchers. Nothing here imports torch."""
