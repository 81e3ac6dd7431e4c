// Loaded first by a Node that an emulator or a loader has started: a program that it starts with its own is started the same way.
const { join } = require('node:path')

process.execPath = join(__dirname, 'node')
