"""Pictures out of diffusion models: samplers, guidance, the pipeline. The models are in `rookery.models`."""
