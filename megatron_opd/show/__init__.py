"""Looking at data: single rollouts coloured by how far teacher and sampler disagree (show), and what is in a store (inspect)."""
