"""The main job: teach a language model a domain without losing its general ability, next to the run that loses it."""
