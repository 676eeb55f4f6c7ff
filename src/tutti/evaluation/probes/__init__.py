"""What a trained policy uses: linear probes, occlusion, input ablation, baselines."""
