"""One image-text model, learnt together by parties that keep their data (CreamFL: Yu et al., ICLR 2023, arXiv
2302.08888, and what it is compared with). Only representations of a public set travel."""
