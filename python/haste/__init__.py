"""haste: diffusion transformers that train faster (HASTE, REPA) and sample faster (feature caching).

    haste.models      SiT, the diffusion transformer
    haste.transport   the paths between noise and data, the velocity loss
    haste.teachers    frozen image encoders, with the attention and the features that a student learns from
    haste.alignment   the losses that hold a student to its teacher
    haste.data        training data from memory, folders, zips and latents, and what prepares it
    haste.vae         the autoencoder between images and latents
    haste.training    the trainer, its presets and its checkpoints
    haste.sampling    Euler, Heun and Euler-Maruyama samplers with guidance
    haste.caching     feature caching: most steps of a sampler at a fraction of their cost
    haste.generation  from a checkpoint to a folder of images
    haste.evaluation  distances between real and generated images, and between two sets of generated ones
    haste.sweep       quality against seconds, over many settings of caching
    haste.cli         the command `haste`

The fused operations underneath are a package of their own, `haste_ext`.
Importing `haste` alone imports nothing heavy.
"""

__version__ = "0.1.0"
