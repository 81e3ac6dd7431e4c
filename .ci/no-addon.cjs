// In place of the addon, where commands are declared and none runs: see build-man.mjs.
module.exports = { start() {} }
