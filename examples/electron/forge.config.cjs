// The same with Electron Forge instead of electron-builder.
module.exports = {
  packagerConfig: {
    asar: { unpack: '**/node_modules/qcow2-*/**' },
    osxUniversal: { x64ArchFiles: '**/node_modules/qcow2-darwin-*/**' },
    osxSign: {},
  },
  makers: [{ name: '@electron-forge/maker-zip' }],
}
