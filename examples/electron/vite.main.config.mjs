// Of the main process, of the utility process and of the preload script, where Vite builds them: the library stays a package.
export default {
  build: { rollupOptions: { external: ['electron', /^qcow2/] } },
}
