"""What serves a group of ranks, and how that is found out and set up.

``shm_all_reduce``, ``custom_all_reduce_v1`` and ``custom_all_reduce_v2`` are the three classes that serve; ``dispatch``
chooses one of them, by ``capability``, ``transfer_check`` and ``thresholds``. ``rendezvous`` is how ranks exchange what
set-up needs, ``open_groups`` knows the size of every open group, ``explanation`` says why a tensor is served as it is.
"""
