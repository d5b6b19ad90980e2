"""The file format of saved posteriors: container, strict JSON, and codecs of all parts of one."""
