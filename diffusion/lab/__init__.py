"""The laboratory: what theory says of a sampler, a schedule and a denoiser, measured where the exact score is known,
and of a trained model as far as it can be known without it.

    gaussian         the law of a walk on Gaussian data, exactly
    initialisation   how far what sampling starts from is from noised data
    training_error   how far a denoiser is from the best there is
    refinement       how far a walk ends from one of more steps on the same noise
    errors           the three together, and their sum against the whole
    verdict          which is largest, and the cheapest setting to change, in words
    modes            how much of each mode a sampler makes
    equivalence      DDPM's loss is DSM's; VP's samples are VE's
    plane            modes that merge and part: densities, scores, paths

Each answers with numbers; it knows no file, no picture and no configuration.
"""
