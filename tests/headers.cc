// Nothing of its own: what it is compiled with are the headers that all tests share, precompiled.
