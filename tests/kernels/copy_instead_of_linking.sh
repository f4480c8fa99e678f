#!/bin/sh
# Called as ROCm's linker: `--version`, or `-flavor gnu -shared OBJECT -o BINARY`.
[ "$1" = --version ] || exec cp "$4" "$6"
